"""The benchmarks' plumbing: peers' formulas, gpu_check's cases that fail, the report of its JSON."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import common  # noqa: E402
import gpu_check  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import sanitizer_program  # noqa: E402
import train_step  # noqa: E402

from relora_kernels import current_backend, measure, problems, prune_  # noqa: E402

CPU = torch.device("cpu")
H200 = {
    "device": "NVIDIA H200", "capability": "sm_90", "driver": "580.1", "package": "0.1.0",
    "torch": "2.13", "triton": "3.7", "kernels": "k", "build": "b", "sources": "cu", "cuda": "13.0",
    "l2_bytes": 50_000_000, "commit": "0123456789abcdef", "rates": {
        "copy_bytes_per_s": 4.3e12, "flop_per_s": 7.9e14,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "problem",
    [
        problems.Linear(37, 48, 33, 8, "forward + backward", "float32", "float32"),
        problems.Linear(37, 48, 33, 8, "backward", "bfloat16", "float32"),
        problems.Merge(((33, 17), (8, 24)), 5),
        problems.Merge(((33, 17),), 5, "compensated"),
        problems.Prune((1000, 77), paired=True),
    ],
    ids=lambda problem: problem.name,
)
def test_every_row_passes_its_check_or_says_why_not(problem, monkeypatch):
    """All peers' formulas compute the same as ours; rows of backends that are not available say so."""
    monkeypatch.setattr(measure, "rates", lambda _: H200["rates"])
    statuses = {}
    for name, row in peers.rows(problem).items():
        record = measure.run(problem, row, CPU, seconds=0.0)
        statuses[name] = record["status"]
        if record["status"] == "ok":
            assert record["median_s"] > 0 and record["baseline_s"] > 0
            assert record["floor_s"] == max(
                problem.flops / 7.9e14, problem.bytes / 4.3e12
            )  # fmt: skip
    assert {n: s for n, s in statuses.items() if not n.startswith("ours ")} == {
        n: "ok" for n in statuses if not n.startswith("ours ")
    }
    assert statuses["ours reference"] == "ok" and "wrong" not in statuses.values()


def test_the_values_of_PAIR_are_rows_of_their_own_and_no_evidence():
    from relora_kernels.cuda import lora_linear as cuda

    problem = problems.Linear(37, 48, 33, 8, common.PAIR)
    backward = dataclasses.replace(problem, direction="backward")
    assert (problem.flops, problem.bytes) == (backward.flops, backward.bytes)
    assert sum(getattr(p, "direction", "") == common.PAIR for p in common.by_worth(gpu=True)) == 3
    rows, before = problem.ours(), cuda.PAIR
    assert list(rows) == [f"ours cuda, PAIR = {value}" for value in (0, 1, 2)]
    for value, row in enumerate(rows.values()):
        with row.in_force():
            assert cuda.PAIR == value
        assert cuda.PAIR == before
        assert measure.run(problem, row, CPU)["status"] == "unavailable"
    assert problem.evidence_class(problem.prepare(CPU)) is None
    row = backward.ours()["ours reference"]
    assert measure.run(problem, row, CPU, seconds=0.0)["status"] == "ok"  # the direction itself


def test_the_values_of_KERNEL_are_rows_of_their_own_and_no_evidence():
    """Each row sets the constant while it runs, and restores it. `auto` and the bars ignore these rows."""
    from relora_kernels.cuda import merge as cuda

    problem = problems.Merge(((33, 48),), 8, by="KERNEL")
    rows, before = peers.rows(problem), cuda.KERNEL
    assert list(rows) == [
        "device copy",
        "ours cuda, KERNEL = streamed",
        "ours cuda, KERNEL = sm90",
    ]
    for value in cuda.KERNELS:
        with rows[f"ours cuda, KERNEL = {value}"].in_force():
            assert cuda.KERNEL == value
        assert cuda.KERNEL == before
    operands = problem.prepare(torch.device("cpu"))
    assert problem.evidence_class(operands) is None
    for factors in ("float32", "bfloat16"):
        single = problems.Merge(((33, 48),), 8, factors=factors)
        assert factors in single.evidence_class(single.prepare(CPU))[1]
    assert sum(getattr(p, "by", "") == "KERNEL" for p in common.by_worth(gpu=True)) == 2


def test_another_ratio_is_a_prune_of_its_own_and_no_evidence():
    problem = problems.Prune((1000,), paired=True)
    other = dataclasses.replace(problem, ratio=0.99)
    assert other.name == problem.name + ", ratio 0.99"
    assert problem.evidence_class(problem.prepare(CPU)) is not None
    assert other.evidence_class(other.prepare(CPU)) is None
    assert measure.run(other, other.ours()["ours reference"], CPU, seconds=0.0)["status"] == "ok"
    assert sum(getattr(p, "ratio", 0.9) != 0.9 for p in common.by_worth(gpu=True)) == 1


def test_partners_pruned_by_their_own_magnitudes_are_wrong():
    def make(o):
        return lambda: prune_(o.tensors + o.partners, o.ratio)

    problem = problems.Prune((1000,), paired=True)
    with pytest.raises(measure.Wrong, match="tensor 1: .* differ"):
        problem.check(measure.Row(make), problem.prepare(CPU))


def test_the_main_loop_has_a_row_for_each_CLUSTER():
    from relora_kernels.cuda import lora_linear as cuda

    rows = problems.Linear(37, 48, 33, 8, common.MAIN_LOOP).ours()
    assert {"ours cuda", "ours cuda, CLUSTER = 1", "ours cuda, CLUSTER = 2"} <= rows.keys()
    with rows["ours cuda, CLUSTER = 2"].in_force():
        assert cuda.CLUSTER == 2
    assert cuda.CLUSTER == 1


def test_flops_and_bytes_are_those_of_the_shapes():
    linear = problems.Linear(16384, 4096, 4096, 128)
    base = 2 * 16384 * 4096 * 4096
    assert linear.flops / (2 * base) == pytest.approx(1.09375)  # 1 + 1.5 r (1/N + 1/K)
    forward, backward = (
        dataclasses.replace(linear, direction=d) for d in ("forward", "backward")
    )  # fmt: skip
    assert forward.flops / base == pytest.approx(1.0625)
    assert forward.flops + backward.flops == linear.flops
    assert forward.bytes + backward.bytes == linear.bytes
    merge = problems.Merge(((4096, 4096),), 128)
    assert merge.bytes == 4 * 4096 * 4096 + 4 * 128 * 8192
    assert problems.Prune((10,)).bytes == 120 and problems.Prune((10,), True).bytes == 200
    model = problems.projections(2048, 5461) * 24
    assert len(problems.moments(model, 128)) == 336


def test_the_full_set_holds_what_was_asked_for():
    linears = common.problems("linear", gpu=True)
    shapes = {(p.in_features, p.out_features) for p in linears}
    for hidden, feed_forward, _ in problems.MODELS.values():
        assert set(problems.projections(hidden, feed_forward)) <= shapes
    assert {(4096, 4096), (4096, 11008), (11008, 4096)} <= shapes
    assert {p.tokens for p in linears} == {2048, 4096, 8192, 16384, 32768}
    assert {p.r for p in linears} == {16, 64, 128, 512}
    everything = common.by_worth(gpu=True)
    names = [p.name for p in everything]
    assert len(set(names)) == len(names) == len(set(everything))
    assert (everything[0].in_features, everything[0].tokens) == (4096, 16384)
    for problem in everything:
        again = problems.from_dict(json.loads(json.dumps(problem.to_dict())))
        assert again == problem and hash(again) == hash(problem)


def test_overhead_is_on_pythons_clock_on_a_gpu_too(monkeypatch):
    """A GPU's own clock starts when the calls are queued: Python's share would not be in it."""
    devices = []

    def timings(steps, device, seconds):
        devices.append(device.type)
        return {name: [2e-6 if name == "ours" else 1e-6] for name in steps}

    monkeypatch.setattr(measure, "timings", timings)
    monkeypatch.setattr(common, "DEVICE", torch.device("cuda", 0))
    monkeypatch.setattr(common, "_IN_TURNS", {})
    benchmark = types.SimpleNamespace(extra_info={}, pedantic=lambda *_, **__: None)
    functions = {"by hand": print, "ours": print}
    common.measure_in_turns(benchmark, "g", "ours", functions)
    assert devices == ["cpu"] and benchmark.extra_info["ratio_to_by_hand"] == 2


class TestTrainStep:
    def test_the_largest_microbatch(self):
        tried = []

        def attempt(n, fits=37):
            tried.append(n)
            return {"peak_bytes": 1000 + 100 * n} if n <= fits else None

        assert train_step.largest(attempt, 1000 + 100 * 40) in (36, 37)
        assert len(tried) <= 6
        assert train_step.largest(lambda n: attempt(n, 0), 100) is None
        assert train_step.largest(lambda n: attempt(n, 1), 100) == 1
        assert train_step.largest(lambda n: attempt(n, 2), 1e9) == 2

    def test_within_a_memory_limit(self, monkeypatch):
        """The path that needs a GPU: the limit holds during the search and the timing, and no longer."""
        shares = []
        monkeypatch.setattr(
            torch.cuda, "set_per_process_memory_fraction", lambda share, _: shares.append(share)
        )
        properties = type("Properties", (), {"total_memory": 48 * 2**30})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)

        def trial(case, n, device, timer):
            assert shares == [0.5]
            timers.append(timer)
            return {"microbatch": n, "peak_bytes": n * 2**30} if n <= 20 else None

        timers: list = []
        monkeypatch.setattr(train_step, "trial", trial)
        case = next(c for c in train_step.cases(gpu=True) if c["gib"])
        record = train_step.run(case, torch.device("cuda", 0), "the last one")
        assert record["status"] == "ok" and record["microbatch"] in (19, 20)
        assert shares == [0.5, 1.0] and timers.count("the last one") == 1
        record = train_step.run({**case, "gib": 49.0}, torch.device("cuda", 0))
        assert record["status"] == "unavailable" and "has 48 GiB" in record["reason"]

    def test_a_wrapped_model_that_is_not_the_plain_one_is_refused(self, monkeypatch):
        pytest.importorskip("transformers")
        monkeypatch.setitem(train_step._preset("micro"), "num_layers", "1")
        forward = train_step.EagerLora.forward
        monkeypatch.setattr(train_step.EagerLora, "forward", lambda s, x: forward(s, x) * 3)
        case = train_step.cases(gpu=False)[1]
        with pytest.raises(measure.Wrong, match="logits"):
            train_step.run(case, CPU)


def fake_case(case):
    """What gpu_check's worker runs in the tests below."""
    if case["kind"] == "machine":
        return {**H200, "capability": "cpu", "device": "Test device"}
    how = case["how"]
    if how == "exit":
        os._exit(7)
    if how == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.pause()
    if how == "raise":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if how == "slow":
        time.sleep(0.3)
    return {"status": "ok", "median_s": 1e-3, "group": "g"}


def fake_cases(*hows):
    return [
        {"kind": "fake", "name": f"{i} {how}", "how": how, "row": how, "group": "g"}
        for i, how in enumerate(hows)
    ]


def check(tmp_path, cases, **options):
    arguments = ["--device", "cpu", "--minutes", "1", "--output", str(tmp_path)]
    status = gpu_check.main(arguments, "test_bench:fake_case", cases)
    return status, json.loads((tmp_path / "test-device.json").read_text())


class TestGpuCheck:
    @pytest.fixture(autouse=True)
    def _import_path(self, monkeypatch):
        monkeypatch.setenv(
            "PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), str(ROOT / "bench"), str(ROOT)])
        )

    def test_a_case_that_fails_loses_itself_alone(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(gpu_check, "FIRST_LIMIT_S", 1.5)
        status, results = check(tmp_path, fake_cases("fine", "exit", "raise", "hang", "fine"))
        assert status == 0
        outcomes = [record["status"] for record in results["cases"].values()]
        assert outcomes == ["ok", "crashed", "raised", "hung", "ok"]
        reasons = [record.get("reason", "") for record in results["cases"].values()]
        assert "ended with 7" in reasons[1] and "illegal memory" in reasons[2]
        assert results["machine"]["commit"] and results["date"] and results["bars"]
        printed = capsys.readouterr().out
        assert "[4/5] 3 hang: hung" in printed and "| bar | target |" in printed

    def test_an_interrupted_run_keeps_what_was_measured(self, tmp_path, capsys):
        def interrupt(*args):
            raise KeyboardInterrupt

        assert check(tmp_path, fake_cases("fine"))[0] == 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpu_check, "measure", interrupt)
            status, results = check(tmp_path, fake_cases("fine", "fine"))
        assert status == 130 and results["machine"]["device"] == "Test device"
        assert "interrupted; " in capsys.readouterr().err

    @pytest.mark.parametrize("minutes", ["nan", "-1", "0", "inf"])
    def test_a_time_that_is_none_is_refused(self, minutes, capsys):
        with pytest.raises(SystemExit) as end:
            gpu_check.main(["--device", "cpu", "--minutes", minutes])
        assert end.value.code == 2 and "expected a number above 0" in capsys.readouterr().err

    def test_it_runs_the_files_that_only_a_gpu_can(self):
        listed = {f"test_{name}.py" for names in gpu_check.TEST_STEPS.values() for name in names}
        files = {file.name: file.read_text() for file in (ROOT / "tests").glob("test_*.py")}
        assert listed <= files.keys() and "test_cuda_gemm_gpu.py" in listed
        whole = re.compile(r"^pytestmark = pytest\.mark\.skipif\(REASON", re.MULTILINE)
        assert {name for name, text in files.items() if whole.search(text)} <= listed
        some = re.compile(r"^def test_gpu_", re.MULTILINE)
        assert {name for name, text in files.items() if some.search(text)} <= listed

    def test_a_step_that_fails_loses_itself_alone(self, monkeypatch):
        """A step that crashes or hangs loses no other's verdict, and steps that passed are not run again."""
        monkeypatch.setattr(gpu_check, "LEAST_S", 0.5)
        hows = {
            "fine": "print('1 passed')", "crash": "import os; os.abort()",
            "hang": "import time; time.sleep(600)", "also fine": "print('2 passed')",
        }  # fmt: skip
        commands = {name: [sys.executable, "-S", "-c", code] for name, code in hows.items()}
        steps = {}
        assert list(gpu_check.run_steps(commands, steps, 8.0)) == list(hows)
        assert [s["status"] for s in steps.values()] == ["ok", "failed", "hung", "ok"]
        assert steps["hang"]["seconds"] < 6 and steps["also fine"]["last_line"] == "2 passed"
        commands["new"] = commands["fine"]
        assert list(gpu_check.run_steps(commands, steps, 0.0)) == ["new", "crash", "hang"]
        assert steps["new"]["status"] == "left out" and steps["crash"]["status"] == "failed"
        assert list(gpu_check.run_steps(commands, steps, 3.0)) == ["new", "crash", "hang"]
        assert steps["new"]["status"] == "ok"

    def test_build_tests_and_sanitizer_stay_within_the_minutes(self, tmp_path, monkeypatch, capsys):
        ran = []

        def run_step(command, folder, limit_s, **environment):
            ran.append((" ".join(command), limit_s, environment))
            return {"status": "ok", "seconds": 1.0, "last_line": "12 passed"}

        def main():
            ran.clear()
            arguments = ["--minutes", "2", "--output", str(tmp_path)]
            assert gpu_check.main(arguments, "test_bench:fake_case", fake_cases("fine")) == 0
            return json.loads((tmp_path / "test-device.json").read_text())["steps"]

        monkeypatch.setattr(gpu_check, "run_step", run_step)
        monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
        steps = main()
        files = [f"tests {name}" for name in gpu_check.TEST_STEPS]
        sanitized = [
            f"sanitizer {tool} {subject}"
            for tool in ("memcheck", "racecheck")
            for subject in ("linear", "merge", "prune")
        ]
        assert list(steps) == ["build", *files, *sanitized]
        assert all(steps[name]["status"] == "ok" for name in ("build", *files))
        for name in sanitized:
            assert steps[name]["status"] == "unavailable"
        assert f"{name}: unavailable in 0 s; compute-sanitizer is not on" in capsys.readouterr().out
        assert " install " in ran[0][0] and ran[0][1] <= 120
        share = 120 * gpu_check.TESTS_SHARE
        assert len(ran) == 1 + len(files) and max(limit for _, limit, _ in ran[1:]) <= share
        assert str(gpu_check.BUILT) in ran[1][2]["PYTHONPATH"]

        monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/cuda/bin/{name}")
        steps = main()
        for (command, limit, environment), name in zip(ran[1:], sanitized, strict=True):
            _, tool, subject = name.split()
            assert command.startswith(
                f"/cuda/bin/compute-sanitizer --tool {tool} --error-exitcode 9"
            )
            parts = " ".join(gpu_check.SANITIZER_PARTS[subject])
            assert command.endswith(f"sanitizer_program.py {parts}") and limit <= 120 * 0.25
            assert environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
            assert steps[name]["status"] == "ok"
        main()
        assert len(ran) == 1  # the build

    def test_only_some_subjects(self, tmp_path, monkeypatch):
        """--only runs these subjects' cases and tests, and writes a file of their own."""
        passed = {"status": "ok", "seconds": 1.0, "last_line": "12 passed"}
        monkeypatch.setattr(gpu_check, "run_step", lambda *args, **kwargs: passed)
        monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
        whole, file = tmp_path / "test-device.json", tmp_path / "test-device-merge-prune.json"
        whole.write_text("everything's")
        arguments = ["--output", str(tmp_path), "--only", "prune", "merge"]
        assert gpu_check.main(arguments, "test_bench:fake_case", fake_cases("fine")) == 0
        results = json.loads(file.read_text())
        assert whole.read_text() == "everything's" and results["only"] == ["merge", "prune"]
        assert report.load(file).command == "python bench/gpu_check.py --only merge prune"
        assert [name for name in results["steps"] if name.startswith("tests")] == [
            "tests cuda_merge", "tests cuda_prune", "tests ops"
        ]  # fmt: skip
        monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/cuda/bin/{name}")
        of_all = [part for parts in gpu_check.SANITIZER_PARTS.values() for part in parts]
        assert sorted(of_all) == sorted(part.__name__ for part in sanitizer_program.PARTS)
        assert set(gpu_check.sanitizer(["prune"])) == {
            f"sanitizer {tool} prune" for tool in gpu_check.SANITIZER_TOOLS
        }
        for command in gpu_check.sanitizer(["prune"]).values():
            assert command[-5].endswith("sanitizer_program.py")
            assert command[-4:] == ["prunes", "windows", "random_prunes", "counts"]
        assert gpu_check.sanitizer(["train"]) == {}

        every = [case["name"] for case in gpu_check.list_cases("cuda", [])]
        parts = {s: gpu_check.list_cases("cuda", [s]) for s in gpu_check.SUBJECTS}
        assert sorted(c["name"] for part in parts.values() for c in part) == sorted(every)
        assert all(c["name"].startswith("merge") for c in parts["merge"]) and parts["merge"]
        assert all(c["kind"] == "train" for c in parts["train"]) and parts["train"]
        with pytest.raises(SystemExit):
            gpu_check.main(["--ship", *arguments])

    @pytest.mark.parametrize("part", sanitizer_program.PARTS)
    def test_every_part_of_the_sanitizers_program_runs(self, part):
        # The reference is compared with itself, so this checks only that the part runs.
        sanitizer_program.run(part, "reference", "cpu")

    def test_the_sanitizers_program_tells_a_difference_and_a_missing_gpu(self):
        with pytest.raises(AssertionError, match="tensor 1, .* not the reference's"):
            sanitizer_program.run(
                lambda device: [torch.ones(2), torch.full((3,), float(len(current_backend())))],
                "cuda", "cpu",
            )  # fmt: skip
        if not torch.cuda.is_available():
            program = [sys.executable, ROOT / "tests" / "sanitizer_program.py"]
            ended = subprocess.run(program, capture_output=True, text=True)
            assert ended.returncode == 2 and "expected a CUDA GPU" in ended.stderr

    def test_it_goes_on_with_the_same_commit_alone(self, tmp_path):
        file, machine = tmp_path / "x.json", {**H200, "rates": {"copy_bytes_per_s": 1.0}}
        done = {"machine": H200, "date": "d", "steps": {}, "cases": {"a": {}}, "bars": []}
        file.write_text(json.dumps(done))
        assert gpu_check.resume(file, machine) == done  # rates differ from run to run
        for name in ("commit", "driver", "kernels", "build", "torch"):
            assert not gpu_check.resume(file, {**machine, name: "another"})["cases"]
        uncommitted = {**H200, "commit": "0123+"}  # does not identify the sources
        file.write_text(json.dumps({**done, "machine": uncommitted}))
        assert not gpu_check.resume(file, uncommitted)["cases"]
        file.write_text("{")
        assert not gpu_check.resume(file, machine)["cases"]

    def test_killed_in_the_middle_it_leaves_what_was_done(self, tmp_path):
        script = (
            "import sys, test_bench\n"
            f"test_bench.check(__import__('pathlib').Path({str(tmp_path)!r}), "
            "test_bench.fake_cases(*['slow'] * 400))\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
        )
        for line in process.stdout:
            if line.startswith("[3/400]"):
                break
        process.kill()
        process.wait()
        process.stdout.close()
        results = json.loads((tmp_path / "test-device.json").read_text())
        assert len(results["cases"]) >= 3
        assert [p.name for p in tmp_path.iterdir() if p.suffix == ".json"] == ["test-device.json"]
        done = len(results["cases"])
        _, rest = check(tmp_path, fake_cases(*["slow"] * done, "fine"))
        assert len(rest["cases"]) == done + 1

    def test_time_that_is_over_leaves_cases_out(self, tmp_path, capsys):
        arguments = ["--device", "cpu", "--minutes", "1e-6", "--output", str(tmp_path)]
        assert gpu_check.main(arguments, "test_bench:fake_case", fake_cases("fine", "fine")) == 0
        assert "left out for lack of time: 2" in capsys.readouterr().out

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
    def test_without_a_gpu_it_says_so(self, tmp_path, capsys):
        arguments = ["--skip", "build", "tests", "--output", str(tmp_path)]
        assert gpu_check.main(arguments) == 2
        assert "expected a CUDA GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())

    def test_results_of_earlier_runs_are_no_change_of_the_commit(self, tmp_path, monkeypatch):
        """Otherwise no run could be continued once results were committed."""
        monkeypatch.setattr(common, "ROOT", tmp_path)
        monkeypatch.delenv("RELORA_KERNELS_COMMIT", raising=False)

        def git(*arguments):
            author = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
            subprocess.run(["git", *author, *arguments], cwd=tmp_path, check=True)

        files = [tmp_path / "bench/results/x.json", tmp_path / "csrc/x.cu"]
        for file in files:
            file.parent.mkdir(parents=True)
            file.write_text("1")
        git("init", "-q")
        git("add", ".")
        git("commit", "-qm", "first")
        files[0].write_text("2")
        assert len(common.commit()) == 40
        files[1].write_text("2")
        assert common.commit().endswith("+")

    def test_an_interrupt_ends_the_step_that_runs(self, tmp_path):
        script = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"
        code = (
            "import sys, pathlib, gpu_check\n"
            f"gpu_check.run_step([sys.executable, '-c', {script!r}], pathlib.Path('.'), 600)"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.DEVNULL
        )
        deadline, pid = time.monotonic() + 60, tmp_path / "pid"
        while not (pid.exists() and pid.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        process.wait(30)
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)

    def test_an_output_that_is_no_folder_is_said_before_anything_runs(
        self, tmp_path, monkeypatch, capsys
    ):
        (tmp_path / "file").write_text("")
        monkeypatch.setattr(gpu_check, "run_step", None)
        assert gpu_check.main(["--output", str(tmp_path / "file" / "results")]) == 2
        assert "expected --output to be a folder" in capsys.readouterr().err

    def test_steps_that_fail_or_hang_are_recorded(self, tmp_path):
        failing = [sys.executable, "-c", "print('first'); print('the reason'); raise SystemExit(3)"]
        step = gpu_check.run_step(failing, tmp_path, 60)
        assert (step["status"], step["exit_status"], step["last_line"]) == (
            "failed",
            3,
            "the reason",
        )
        hanging = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(600)"]
        step = gpu_check.run_step(hanging, tmp_path, 2)
        assert str(ROOT) not in json.dumps(gpu_check.run_step([*failing, str(ROOT)], tmp_path, 60))
        assert step["status"] == "hung" and step["last_line"] == "begun" and step["seconds"] < 30

    def test_what_is_shipped_is_what_auto_reads(self, tmp_path, monkeypatch):
        from relora_kernels import evidence

        monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
        monkeypatch.setattr(evidence, "RECORDS", tmp_path / "relora_kernels" / "records")
        monkeypatch.setenv(evidence.CACHE_VARIABLE, str(tmp_path))  # not the user's own
        cases = synthetic_cases()
        del cases["linear forward 16384 tokens, 2048 to 2048, r 128, bfloat16 - ours triton"]
        path = gpu_check.ship({"machine": H200, "cases": cases})
        assert path.name == "nvidia-h200.json"
        here = {k: v for k, v in H200.items() if isinstance(v, str)}
        (source,) = evidence.sources({**here, "driver": "another", "torch": "another"})
        assert source.refused is None and source.kind == "record"
        found = {(e["op"], *e["class"]): e["order"] for e in source.entries}

        def order(size):
            return found.get(("lora_linear", "bfloat16", 14, size, size, 128, False))

        assert order(4096)[0] == "triton"
        assert order(1024)[0] == "reference" and "triton" not in order(1024)  # it hung there
        assert order(2048) is None  # not every row of ours was measured
        assert gpu_check.ship({"machine": H200, "cases": {}}) is None and path.exists()
        with pytest.raises(SystemExit):
            gpu_check.main(["--device", "cpu", "--ship"])


def synthetic_cases() -> dict:
    """Records as of a run on a GPU, with times made up from a row's place in its group."""
    cases = {}
    rank = {"ours triton": 1.0, "two-call order": 1.05, "ours reference": 1.06}
    found = [p for p in common.by_worth(gpu=True) if getattr(p, "tokens", 16384) == 16384]
    for problem in found:
        floor = max(problem.flops / 7.9e14, problem.bytes / 4.3e12)
        for i, row in enumerate(peers.rows(problem)):
            slow = rank.get(row, 1.1 + 0.05 * i)
            slow = 0.95 if row in report.BASELINES else slow
            shapes = getattr(problem, "shapes", [])
            baseline = 0.95 * floor if not shapes else (
                4 * sum(m * n for m, n in shapes) * (2 if problem.dtype == "float32" else 1) / 4.3e12
            )  # fmt: skip
            fits = None
            if getattr(problem, "direction", "") == "forward":
                fits = [
                    "lora_linear",
                    [
                        problem.dtype,
                        14,
                        problem.out_features,
                        problem.in_features,
                        problem.r,
                        False,
                    ],
                ]
            cases[f"{problem.name} - {row}"] = {
                "kind": "row", "status": "ok", "row": row, "group": problem.name,
                "problem": problem.to_dict(), "flops": problem.flops, "bytes": problem.bytes,
                "floor_s": floor, "median_s": 1.05 * floor * slow, "baseline_s": baseline,
                "fraction_of_floor": 1 / (1.05 * slow), "error": 1e-3, "error_over_eager": 0.9,
                "repeatable": True, "peak_bytes": int(1e7 * (i + 1)), "evidence": fits,
            }  # fmt: skip
    lost = "linear forward 16384 tokens, 1024 to 1024, r 128, bfloat16 - ours triton"
    cases[lost] = {**cases[lost], "status": "hung", "reason": "no answer within 90 s"}
    for preset in train_step.MODELS:
        for method, speed in (("full-rank", 1.0), ("eager LoRA", 0.95), ("ours", 1.2)):
            group = f"train step {preset} eager, equal microbatch"
            cases[f"{group} - {method}"] = {
                "kind": "train", "status": "ok", "row": method, "group": group, "microbatch": 16,
                "tokens_per_s": 1e5 * speed, "median_s": 1e-2 / speed,
                "peak_bytes": int(3e10 / speed), "loss": 10.0,
            }  # fmt: skip
    return cases


@pytest.fixture
def results(tmp_path):
    """Made-up JSON of a run on a GPU."""
    path = tmp_path / "results.json"
    content = {"machine": H200, "date": "2026-01-01", "steps": {}, "cases": synthetic_cases()}
    path.write_text(json.dumps(content))
    return path


class TestReport:
    def test_bars_are_judged_at_their_worst_shape(self, results):
        loaded = report.load(results)
        found = {bar.name: bar for bar in report.bars(loaded)}
        assert found["forward + backward over the two-call order"].met is True
        assert found["forward over the two-call order"].measured.startswith("1.010 at 1024 to 1024")
        assert found["forward over the two-call order"].met is False  # there triton's row was lost
        assert found["forward + backward over full rank, 4096 squared"].met is not None
        assert found["merge, of the device's copy rate (CUDA's bar)"].met is True
        assert found["prune of the 1.3B model's LoRA moments, ms"].met is True
        assert found["train step, GB less than full rank (1.3B)"].measured.startswith(
            "5.000 at 1.3b"
        )
        assert found["train step, GB less than full rank (1.3B)"].met is False
        loops = [row for row in loaded.rows if " main loop " in row["group"]]
        for name, met in (("ours cuda", True), ("ours cuda, CLUSTER = 2", False)):
            for row in loops:
                row["median_s"] = row["baseline_s"] * (1.01 if row["row"] == name else 1.2)
            bars = {bar.name: bar for bar in report.bars(loaded)}
            assert bars["main loop alone, of cuBLAS's speed"].met is met
        for row in loaded.rows:
            if row["row"] == "ours triton":
                row["repeatable"] = False
        repeatable = {bar.name: bar for bar in report.bars(loaded)}["gradients bitwise repeatable"]
        assert repeatable.met is False and "ours triton" in repeatable.measured

    def test_a_cpus_times_settle_no_bar_of_a_gpu(self, results):
        loaded = report.load(results)
        loaded.machine = {**H200, "capability": "cpu"}
        assert {b.met for b in report.bars(loaded)} == {None}

    def test_tables_and_plots(self, results, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        folder = tmp_path / "plots"
        assert report.main([str(results), "--output", str(folder)]) == 0
        printed = capsys.readouterr().out
        assert "NVIDIA H200" in printed and "2026-01-01" in printed and "0123456789ab" in printed
        assert (
            "**linear forward + backward 16384 tokens, 4096 to 4096, r 128, bfloat16**" in printed
        )
        baselines = [s for s in printed.splitlines() if s.startswith("| frozen linear")]
        assert baselines  # the op's floor does not apply to them
        assert not any(line.split("|")[6].strip() for line in baselines)
        for name in ("roofline", "speedup", "memory"):
            assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"

    def test_readme_between_the_marks(self, results, tmp_path, capsys):
        readme = tmp_path / "README.md"
        readme.write_text("before\n<!-- figures -->\nold\n<!-- /figures -->\nafter\n")
        assert report.main([str(results), "--readme", str(readme)]) == 0
        text = readme.read_text()
        assert text.startswith("before\n<!-- figures -->\n") and text.endswith("-->\nafter\n")
        assert "old" not in text and "NVIDIA H200" in text and "| 4096, 4096 | triton |" in text
        merges = [line for line in text.splitlines() if line.startswith("| merge ")]
        assert any("168 weights" in line and "| eager merge |" in line for line in merges)
        assert not any("stochastic 4096" in line for line in merges)
        assert report.main([str(results), "--readme", str(readme)]) == 0
        assert readme.read_text() == text
        readme.write_text("no marks")
        assert report.main([str(results), "--readme", str(readme)]) == 1
        assert "expected <!-- figures -->" in capsys.readouterr().err
        assert readme.read_text() == "no marks"

    def test_of_several_files_the_last_that_holds_a_problem_counts(self, results, tmp_path):
        readme, newer = tmp_path / "README.md", tmp_path / "newer.json"
        readme.write_text("<!-- figures -->\n<!-- /figures -->\n")
        content = json.loads(results.read_text())
        content["date"] = "2026-02-02"
        content["cases"] = {k: r for k, r in content["cases"].items() if k.startswith("prune")}
        for row in content["cases"].values():
            row["median_s"] = 7.0
        newer.write_text(json.dumps(content))
        assert report.main([str(results), str(newer), "--readme", str(readme)]) == 0
        older, _, last = readme.read_text().partition("2026-02-02")
        assert "| prune " not in older and "| merge " in older
        assert "| 7e+03 |" in last and "| merge " not in last

    def test_readme_takes_no_figures_of_a_cpu(self, results, tmp_path, capsys):
        readme = tmp_path / "README.md"
        readme.write_text("<!-- figures --><!-- /figures -->")
        content = json.loads(results.read_text())
        content["machine"]["capability"] = "cpu"
        results.write_text(json.dumps(content))
        assert report.main([str(results), "--readme", str(readme)]) == 1
        assert "expected a GPU's results" in capsys.readouterr().err

    @pytest.mark.parametrize("content",
        ["{", "{}", "[]", None, '{"benchmarks": [{}]}', '{"benchmarks": 3}', '{"cases": {"a": 1}}',
         '{"cases": {}, "machine": {}, "date": ""}'],
    )  # fmt: skip
    def test_what_is_no_result_is_refused(self, tmp_path, content, capsys):
        path = tmp_path / "x.json"
        if content is not None:
            path.write_text(content)
        assert report.main([str(path)]) == 1
        assert capsys.readouterr().err.startswith("report: ")

    @pytest.mark.parametrize(
        "key, value", [("median_s", None), ("median_s", "1"), ("median_s", 0), ("baseline_s", None),
                       ("baseline_s", 0), ("problem", None)],
    )  # fmt: skip
    def test_a_damaged_row_is_told_with_its_file(self, results, key, value, capsys):
        content = json.loads(results.read_text())
        for row in content["cases"].values():
            if key in row:
                row[key] = value
        results.write_text(json.dumps(content))
        assert report.main([str(results)]) == 1
        told = capsys.readouterr()
        assert f"report: expected whole results in {results}" in told.err and not told.out


def test_the_json_of_a_cpu_run_feeds_the_report(tmp_path, capsys):
    """A few rows of `pytest bench/ --benchmark-only` become tables and plots without edits."""
    path = tmp_path / "results.json"
    # Under pytest-xdist nothing is benchmarked.
    outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench", "--benchmark-only", f"--benchmark-json={path}",
         "-q", "-rs", "-p", "no:cacheprovider", "-k", "python_overhead or nearest"],
        cwd=ROOT, env={**outside, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    if not torch.cuda.is_available():
        assert "tensors are on a CPU" in done.stdout  # a skipped row gives its reason
    content = json.loads(path.read_text())
    assert content["machine_info"]["rates"]["flop_per_s"] > 0 and content["machine_info"]["commit"]
    row = next(b for b in content["benchmarks"] if b["extra_info"]["row"] == "ours reference")
    wanted = {"flops", "bytes", "floor_s", "fraction_of_floor", "error", "peak_bytes", "problem"}
    assert wanted <= set(row["extra_info"])
    assert report.main([str(path), "--output", str(tmp_path / "plots")]) == 0
    assert "| ours reference |" in capsys.readouterr().out
    overhead = [b for b in content["benchmarks"] if "in_turns" in b["extra_info"]]
    assert {b["extra_info"]["row"] for b in overhead} == {"by hand", "FusedReLoRaLinear"}
