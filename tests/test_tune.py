"""Evidence: what `tune` measures and writes, and what `auto` makes of it."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path

import pytest
import torch

from relora_kernels import __main__ as status
from relora_kernels import backend, evidence, measure, problems, tune
from relora_kernels.worker import Worker

HERE = {
    "device": "Some GPU", "capability": "sm_90", "driver": "580.1", "package": "1", "torch": "2",
    "triton": "3", "kernels": "abc", "build": "def", "sources": "cu",
}  # fmt: skip
CLASS = ["bfloat16", 14, 384, 256, 16, False]


class OnGpu:
    """The parts of a CUDA tensor that the look-up reads."""

    is_cuda = True

    def __init__(self, *shape, dtype=torch.bfloat16):
        self.shape, self.dtype = torch.Size(shape), dtype

    def get_device(self):
        return 0

    def numel(self):
        return self.shape.numel()


def call(tokens=16384, in_features=256, out_features=384, r=16, dropout_p=0.0):
    """The arguments of lora_linear's forward, as `resolve` sees them."""
    return (
        OnGpu(tokens, in_features), OnGpu(out_features, in_features), OnGpu(r, in_features),
        OnGpu(out_features, r), 1.0, None, dropout_p, None,
    )  # fmt: skip


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache and no shipped records, on a machine that is HERE."""
    monkeypatch.setenv(evidence.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(evidence, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(evidence, "identity", lambda device: HERE)
    evidence.forget()
    yield evidence.cache_path()
    evidence.forget()


def entry(order, op="lora_linear", its_class=CLASS):
    return {"op": op, "class": its_class, "order": order, "rows": {}}


def backends(**reasons):
    """Implementations that answer why_not with these reasons."""
    return {
        name: types.SimpleNamespace(why_not=lambda *_, reason=reason: reason, name=name)
        for name, reason in reasons.items()
    }


class TestAutoFollowsTheRecord:
    def chosen(self, args=None, **reasons):
        reasons = reasons or {"reference": None, "triton": None, "cuda": None}
        return backend.resolve(
            "lora_linear", backends(**reasons), "why_not", *(args or call())
        ).name

    def test_without_one_the_default_order_holds(self, cache):
        assert self.chosen() == "reference"

    def test_the_fastest_that_can_serve_the_call(self, cache):
        evidence.write(cache, HERE, [entry(["cuda", "triton", "reference"])])
        assert self.chosen() == "cuda"
        assert self.chosen(reference=None, triton=None, cuda="not built") == "triton"
        assert (
            self.chosen(reference=None, triton=None) == "triton"
        )  # cuda is not installed any more

    @pytest.mark.parametrize(
        "other",
        [{"tokens": 8192}, {"tokens": 16385}, {"in_features": 255}, {"r": 8}, {"dropout_p": 0.1}],
    )
    def test_for_its_class_of_calls_only(self, cache, other):
        evidence.write(cache, HERE, [entry(["triton", "reference"])])
        assert self.chosen(call(tokens=8193)) == "triton"
        assert self.chosen(call(**other)) == "reference"

    def test_a_named_backend_is_not_overruled(self, cache):
        evidence.write(cache, HERE, [entry(["triton", "reference"])])
        with backend.use_backend("reference"):
            assert self.chosen() == "reference"

    def test_shipped_records_come_behind_the_users_cache(self, cache, tmp_path):
        other_driver = {**HERE, "driver": "1", "torch": "9"}
        evidence.write(
            tmp_path / "records" / "gpu.json", other_driver, [entry(["triton", "reference"])]
        )
        assert self.chosen() == "triton"
        evidence.write(cache, HERE, [entry(["reference"])])  # tune found triton wrong here
        evidence.forget()
        assert self.chosen() == "reference"

    @pytest.mark.parametrize("changed", ["device", "package", "kernels", "sources"])
    def test_a_shipped_record_of_other_kernels_or_devices_counts_for_nothing(
        self, cache, tmp_path, changed
    ):
        path = tmp_path / "records" / "gpu.json"
        evidence.write(path, {**HERE, changed: "other"}, [entry(["triton", "reference"])])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert self.chosen() == "reference"

    def test_where_no_cuda_kernels_are_built_a_record_of_any_holds(
        self, cache, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(evidence, "identity", lambda device: {**HERE, "sources": "none"})
        evidence.write(tmp_path / "records" / "gpu.json", HERE, [entry(["triton", "reference"])])
        assert self.chosen() == "triton"

    def test_prune_and_merge_and_backward_have_classes_too(self, cache):
        weight, lora_A, lora_B = OnGpu(8, 4), OnGpu(2, 4), OnGpu(8, 2)
        calls = {
            "merge_": (weight, lora_A, lora_B, 1.0, "nearest", None, 0, 0),
            "prune_": ([lora_A, lora_B], 0.9, []),
            "lora_linear backward": (
                OnGpu(3, 8), OnGpu(3, 4), weight, lora_A, lora_B, None, 1.0, 0.0, None,
                True, True, True, False,
            ),
        }  # fmt: skip
        evidence.write(
            cache,
            HERE,
            [
                entry(["triton"], op, list(evidence.CLASSES[op](*args)))
                for op, args in calls.items()
            ],
        )
        for op, args in calls.items():
            assert evidence.order(op, args) == ("triton",), op
        assert evidence.order("prune_", ([], 0.9, [])) == ()
        assert evidence.order("an op without classes", ("whatever", OnGpu(1))) == ()

    def test_no_look_up_on_a_cpu_and_a_short_one_on_a_gpu(self, cache, monkeypatch):
        monkeypatch.setattr(evidence, "read_table", None)  # not even the file is read
        cpu = torch.empty(3, 4)
        assert evidence.order("lora_linear", (cpu, cpu)) == ()
        evidence._tables[0] = {("lora_linear", *CLASS): ("triton",)}
        args, best = call(), float("inf")
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(200):
                evidence.order("lora_linear", args)
            best = min(best, (time.perf_counter() - start) / 200)
        assert best < 20e-6  # 1 to 2 us; the bound is for a busy machine and still excludes any I/O


def test_a_compiled_layer_follows_the_record_of_the_moment(monkeypatch):
    """Ops choose a backend when they run: a changed record causes neither a graph break nor a recompilation."""
    from relora_kernels import FusedReLoRaLinear
    from relora_kernels.ops import lora_linear

    reference = lora_linear.IMPLEMENTATIONS["reference"]
    served = []

    def serve(name):
        def forward(*args):
            served.append(name)
            return reference.forward(*args)

        return types.SimpleNamespace(why_not_forward=lambda *_: None, forward=forward)

    on_record = []
    monkeypatch.setattr(evidence, "order", lambda op, args: tuple(on_record))
    for name in ("triton", "cuda"):
        monkeypatch.setitem(lora_linear.IMPLEMENTATIONS, name, serve(name))
    layer = torch.compile(FusedReLoRaLinear(8, 8, r=2), backend="eager", fullgraph=True)
    with torch.no_grad(), torch.compiler.set_stance("default"):
        layer(torch.ones(3, 8))
        with torch.compiler.set_stance("fail_on_recompile"):
            for name in ("triton", "cuda"):
                on_record[:] = [name]
                layer(torch.ones(3, 8))
    assert served == ["triton", "cuda"]


class TestACacheThatCannotBeFollowed:
    @pytest.mark.parametrize(
        "content, words",
        [
            ("{", "no JSON"),
            ("", "no JSON"),
            ("[" * 100_000, "no JSON"),
            ("[]", "format"),
            ('{"format": 99, "devices": {}}', "format"),
            ('{"format": 1}', "devices"),
            ('{"format": 1, "devices": {"Other sm_80": {}}}', "Other sm_80"),
            ('{"format": 1, "devices": {"Some GPU sm_90": 3}}', "made with"),
            (b"\xff\xfe", "no JSON"),
        ],
    )
    def test_is_ignored_with_one_warning(self, cache, content, words):
        cache.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.warns(RuntimeWarning, match=words) as caught:
            for _ in range(3):
                assert evidence.order("lora_linear", call()) == ()
            evidence.read_table(1)  # of another GPU of this machine
        assert len(caught) == 1 and "tune.json" in str(caught[0].message)

    def test_of_another_format_is_kept_beside_the_new_one(self, cache):
        newer = '{"format": 99, "devices": {"Some GPU sm_90": "months of it"}}'
        cache.write_text(newer)
        evidence.write(cache, HERE, [entry(["triton"])])
        assert cache.with_name("tune.json.old").read_text() == newer
        assert evidence.order("lora_linear", call()) == ("triton",)

    @pytest.mark.parametrize(
        "changed", ["driver", "torch", "triton", "package", "kernels", "build"]
    )
    def test_made_with_other_versions(self, cache, changed):
        evidence.write(cache, {**HERE, changed: "other"}, [entry(["triton"])])
        with pytest.warns(RuntimeWarning, match=f"made with {changed} other") as caught:
            assert evidence.order("lora_linear", call()) == ()
        assert len(caught) == 1

    @pytest.mark.parametrize(
        "broken", [{"order": "triton"}, {"order": [1]}, {"class": None}, {"class": [[]]}, {"op": 1}]
    )
    def test_with_an_entry_that_is_none(self, cache, broken):
        evidence.write(cache, HERE, [entry(["triton"])])
        content = json.loads(cache.read_text())
        content["devices"]["Some GPU sm_90"]["entries"][0] |= broken
        cache.write_text(json.dumps(content))
        with pytest.warns(RuntimeWarning, match="entry"):
            assert evidence.order("lora_linear", call()) == ()

    def test_a_folder_in_its_place(self, cache):
        cache.mkdir()
        with pytest.warns(RuntimeWarning, match="ignored"):
            assert evidence.order("lora_linear", call()) == ()

    def test_none_at_all_is_no_news(self, cache):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert evidence.order("lora_linear", call()) == ()


@pytest.mark.parametrize("home", [None, "closed"])
def test_without_a_home_folder_to_look_into_there_is_no_cache(home, cache, monkeypatch, tmp_path):
    """As in a container that runs as a user without a name, or with another user's HOME."""
    monkeypatch.delenv(evidence.CACHE_VARIABLE)
    if home is None:
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
        with pytest.raises(OSError, match="no home"):
            evidence.cache_path()
    else:
        monkeypatch.setattr(Path, "home", lambda: tmp_path)

        for name in ("stat", "lstat"):

            def closed(path, *args, real=getattr(os, name), **options):
                if str(path).endswith("tune.json"):
                    raise PermissionError(13, "Permission denied", str(path))
                return real(path, *args, **options)

            monkeypatch.setattr(os, name, closed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evidence.order("lora_linear", call()) == ()


class TestWriting:
    def test_other_devices_and_other_classes_stay(self, cache):
        other = {**HERE, "device": "Other GPU"}
        evidence.write(cache, other, [entry(["cuda"])])
        evidence.write(cache, HERE, [entry(["triton"]), entry(["triton"], "merge_", ["x"])])
        evidence.write(cache, HERE, [entry(["reference"])])
        content = json.loads(cache.read_text())["devices"]
        assert content["Other GPU sm_90"]["entries"][0]["order"] == ["cuda"]
        assert {e["op"]: e["order"] for e in content["Some GPU sm_90"]["entries"]} == {
            "lora_linear": ["reference"],
            "merge_": ["triton"],
        }

    def test_entries_of_other_versions_do_not_stay(self, cache):
        evidence.write(cache, {**HERE, "driver": "1"}, [entry(["triton"], "merge_", ["x"])])
        evidence.write(cache, HERE, [entry(["triton"])])
        entries = json.loads(cache.read_text())["devices"]["Some GPU sm_90"]["entries"]
        assert [e["op"] for e in entries] == ["lora_linear"]

    def test_lists_of_numbers_stay_on_one_line_and_nothing_changes(self, tmp_path):
        content = {
            "sizes": [1, 2],
            "text": "[\n1,   2\n]",
            "mixed": [1, "a"],
            "pairs": [[1, 2], [3]],
        }
        evidence.write_json(tmp_path / "x.json", content)
        text = (tmp_path / "x.json").read_text()
        assert json.loads(text) == content and "[ 1, 2 ]" in text

    def test_a_failed_write_leaves_the_old_file_and_nothing_else(self, cache, monkeypatch):
        evidence.write(cache, HERE, [entry(["triton"])])
        old = cache.read_bytes()
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            evidence.write(cache, HERE, [entry(["cuda"])])
        assert cache.read_bytes() == old and [p.name for p in cache.parent.iterdir()] == [
            cache.name
        ]


def test_entries_leave_out_what_failed_and_groups_that_were_not_finished():
    def record(group, name, status="ok", median_s=1.0, baseline_s=1.0):
        return {
            "group": group, "row": f"ours {name}", "status": status, "median_s": median_s,
            "baseline_s": baseline_s, "error": 0.0, "error_over_eager": 1.0,
            "evidence": ("lora_linear", [group]),
        }  # fmt: skip

    found = problems.entries(
        [
            record("a", "reference", median_s=2.0, baseline_s=2.0),
            record("a", "triton", median_s=1.8, baseline_s=2.0),
            record("a", "cuda", status="wrong"),
            record("a", "triton_tma", median_s=1.0, baseline_s=0.9),  # the baseline was fast, too
            record("b", "reference"),
            record("b", "triton", status="left out"),
            record("c", "triton"),
        ]
    )
    assert [(e["class"], e["order"]) for e in found] == [
        (["a"], ["triton", "reference", "triton_tma"])
    ]


@pytest.mark.parametrize("status", ["wrong", "hung", "crashed", "raised"])
def test_what_fails_at_one_size_of_a_class_is_out_at_all(status):
    def record(group, name, status="ok"):
        return {
            "group": group, "row": f"ours {name}", "status": status, "median_s": 1.0,
            "baseline_s": 1.0, "error": 0.0, "error_over_eager": 1.0,
            **({"evidence": ("lora_linear", [14])} if status == "ok" else {}),
        }  # fmt: skip

    records = [
        record("9000 tokens", "reference"), record("9000 tokens", "triton", status),
        record("16384 tokens", "reference"), record("16384 tokens", "triton"),
    ]  # fmt: skip
    for found in (records, records[::-1]):
        assert [e["order"] for e in problems.entries(found)] == [["reference"]]


class TestChecksBeforeTiming:
    CPU = torch.device("cpu")

    @pytest.mark.parametrize("broken", ["y", "dx", "nan", "zero"])
    def test_a_wrong_product_is_not_timed(self, broken, monkeypatch):
        problem = problems.Linear(65, 96, 80, 24, dtype="float32", factors="float32")

        def make(o):
            def product():
                y = torch.nn.functional.linear(o.x, o.weight)
                y = y + o.scaling * o.x @ o.lora_A.T @ o.lora_B.T
                if broken == "y":
                    y = torch.cat([y[:-1], y[-1:] * (1 + 1e-5)])
                if broken == "dx":
                    y = y + (o.x.sum() - o.x.sum().detach()) * 1e-5
                return {"nan": y * float("nan"), "zero": y * 0}.get(broken, y)

            return product

        monkeypatch.setattr(measure, "times", None)
        record = measure.run(problem, measure.Row(make), self.CPU)
        assert record["status"] == "wrong" and "reason" in record

    @pytest.mark.parametrize("rounding", ["nearest", "compensated", "stochastic"])
    def test_a_merge_that_does_nothing_is_wrong(self, rounding, monkeypatch):
        monkeypatch.setattr(measure, "times", None)
        problem = problems.Merge(((64, 48), (33, 17)), 8, rounding)
        record = measure.run(problem, measure.Row(lambda o: lambda: None), self.CPU)
        assert record["status"] == "wrong"

    def test_a_prune_that_keeps_one_too_many_is_wrong(self, monkeypatch):
        def make(o):
            def prune():
                kept = o.fresh[0].abs().argmin()
                problems.prune_op.prune_(o.tensors, o.ratio)
                o.tensors[0][kept] = o.fresh[0][kept]

            return prune

        monkeypatch.setattr(measure, "times", None)
        record = measure.run(problems.Prune((1000,)), measure.Row(make), self.CPU)
        assert record["status"] == "wrong" and "1 of 1000" in record["reason"]

    def test_times_take_turns_and_operands_are_used_in_turn(self):
        seen = []
        steps = {n: [lambda n=n, i=i: seen.append((n, i)) for i in range(3)] for n in "ab"}
        found = measure.timings(steps, self.CPU, seconds=0.0)
        assert all(len(samples) == 5 and min(samples) > 0 for samples in found.values())
        for name in "ab":
            turns = [i for n, i in seen if n == name]
            assert turns[:6] == [0, 1, 2, 0, 1, 2]

    def test_on_a_gpu_events_are_read_after_the_queue_is_full(self, monkeypatch):
        """The path that needs a GPU, on a simulated clock: each call takes 3 ms of device time."""
        log = []

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                log.append("event")
                self.at = 3.0 * log.count("call")  # ms

            def elapsed_time(self, end):
                assert log[-1] == "synchronise"
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: log.append("synchronise"))
        found = measure.timings(
            {"a": [lambda: log.append("call")] * 2, "b": [lambda: log.append("call")]},
            torch.device("cuda", 0),
            seconds=0.0,
            restore={"b": [lambda: log.append("restore")]},
        )
        assert found["b"] == pytest.approx([3e-3] * 5) and found["a"] == pytest.approx([3e-3] * 5)
        assert log[-6:] == ["restore", "sleep", "event", "call", "event", "synchronise"]

    def test_small_operands_are_rotated_beyond_l2(self, monkeypatch):
        properties = types.SimpleNamespace(L2_cache_size=50 * 2**20)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        gpu = torch.device("cuda", 0)
        small, large = problems.Merge(((1024, 1024),), 128), problems.Merge(((8192, 8192),), 128)
        assert measure.copies(small, gpu) * 2 * 1024**2 >= 2 * 50 * 2**20
        assert measure.copies(large, gpu) == 1 and measure.copies(small, self.CPU) == 1

    def test_models_are_the_presets(self):
        args = pytest.importorskip("relora_kernels.train.args")
        for name, sizes in problems.MODELS.items():
            columns = ("hidden_size", "intermediate_size", "num_layers")
            assert sizes == tuple(int(args.PRESETS[name][c]) for c in columns)


def misbehave(how):
    """Run in a worker by the tests below."""
    if how == "exit":
        os._exit(3)
    if how == "hang":
        signal.pause()
    print("this goes to no answer")
    return {"got": how, "pid": os.getpid()}


class TestWorker:
    TARGET = "test_tune:misbehave"

    def worker(self):
        return Worker(self.TARGET, path=[Path(__file__).parent])

    def test_one_process_answers_until_it_dies(self):
        with self.worker() as worker:
            first = worker.call("fine", 60)
            assert first["status"] == "ok" and first["value"]["got"] == "fine"
            assert worker.call("again", 60)["value"]["pid"] == first["value"]["pid"]
            answer = worker.call("exit", 60)
            assert answer["status"] == "crashed" and "ended with 3" in answer["reason"], answer
            assert worker.call("after", 60)["value"]["got"] == "after"

    def test_it_imports_as_well_where_python_leaves_out_the_current_folder(self):
        path = [Path(__file__).parent]
        with Worker(self.TARGET, path=path, environment={"PYTHONSAFEPATH": "1"}) as worker:
            assert worker.call("fine", 60)["status"] == "ok"

    def test_one_that_cannot_start_says_why(self):
        with Worker("no_such_module:function") as worker:
            answer = worker.call("fine", 60)
        assert answer["status"] == "crashed" and "no_such_module" in answer["log"]

    def test_a_hanging_one_dies_with_its_parent(self, tmp_path):
        script = (
            "import os, sys\n"
            f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            "from relora_kernels.worker import Worker\n"
            f"worker = Worker({self.TARGET!r}, path=[{str(Path(__file__).parent)!r}])\n"
            "print(worker.call('fine', 60)['value']['pid'], flush=True)\n"
            "worker.call('hang', 600)\n"
        )
        parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        pid = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        parent.stdout.close()
        deadline = time.monotonic() + 20
        while _alive(pid):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def run_tune(*arguments, **environment):
    kept = {k: v for k, v in os.environ.items() if k != backend.ENVIRONMENT_VARIABLE}
    return subprocess.run(
        [sys.executable, "-m", "relora_kernels", "tune", *arguments],
        env={**kept, **environment}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


class TestCommand:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
    def test_without_a_gpu_it_says_so(self):
        done = run_tune()
        assert done.returncode == 2 and "expected a CUDA GPU" in done.stderr and not done.stdout

    def test_on_a_cpu_it_writes_what_it_measured(self, tmp_path):
        arguments = ("--device", "cpu", "--shapes", "24x40", "--tokens", "33", "--r", "4")
        done = run_tune(*arguments, RELORA_KERNELS_CACHE=str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert "row/s" in done.stderr or "s/row" in done.stderr  # the progress bar
        assert "reference" in done.stdout and "unavailable: the tensors are on a CPU" in done.stdout
        content = json.loads((tmp_path / "tune.json").read_text())
        entries = content["devices"]["cpu cpu"]["entries"]
        classes = {(e["op"], *e["class"]): e for e in entries}
        linear = classes["lora_linear", "float32", 6, 40, 24, 4, False]
        assert linear["order"] == ["reference"] and linear["rows"]["reference"]["median_s"] > 0
        assert {e["op"] for e in entries} == set(evidence.CLASSES)

    def test_a_bound_of_no_time_writes_nothing(self, tmp_path):
        done = run_tune(
            "--device", "cpu", "--shapes", "24x40", "--minutes", "1e-9",
            RELORA_KERNELS_CACHE=str(tmp_path),
        )  # fmt: skip
        assert done.returncode == 1 and "nothing was written" in done.stderr
        assert "left out" in done.stdout and not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "option, value, says",
        [("--minutes", "0", "> 0"), ("--minutes", "soon", "> 0"), ("--dropout", "1", "in [0, 1)"),
         ("--dropout", "half", "in [0, 1)")],
    )  # fmt: skip
    def test_bad_numbers_are_refused(self, capsys, option, value, says):
        with pytest.raises(SystemExit):
            tune.main([option, value])
        assert f"{option}: expected a number {says}, got '{value}'" in capsys.readouterr().err

    def test_a_folder_that_cannot_be_written(self, tmp_path, monkeypatch, capsys):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv(evidence.CACHE_VARIABLE, str(tmp_path / "file"))
        record = {
            "group": "g", "row": "ours reference", "status": "ok", "median_s": 1.0, "baseline_s": 1.0,
            "error": 0.0, "error_over_eager": 1.0, "fraction_of_floor": 1.0,
            "evidence": ("merge_", ["x"]),
        }  # fmt: skip
        monkeypatch.setattr(tune, "_measure", lambda cases, args: ([record], False))
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: io.StringIO())
        (tmp_path / "disk").mkdir()
        monkeypatch.setattr(evidence, "write", lambda *_: (_ for _ in ()).throw(OSError("full")))
        monkeypatch.setenv(evidence.CACHE_VARIABLE, str(tmp_path / "disk"))
        assert tune.main(["--device", "cpu", "--shapes", "8x8"]) == 1
        assert "could not be written: full" in capsys.readouterr().err
        monkeypatch.setattr(tune, "_measure", None)  # it is said before anything is measured
        monkeypatch.setenv(evidence.CACHE_VARIABLE, str(tmp_path / "file"))
        assert tune.main(["--device", "cpu", "--shapes", "8x8"]) == 1
        assert "could not be written" in capsys.readouterr().err

    def test_a_row_cut_off_by_the_end_of_the_time_is_left_out(self, monkeypatch):
        """Otherwise a shape whose last backend was cut off would be recorded as finished without it."""
        hung = {"status": "hung", "reason": "no answer within 1 s", "log": ""}
        monkeypatch.setattr(Worker, "call", lambda self, case, limit_s: dict(hung))
        args = tune._parser().parse_args(["--device", "cpu", "--minutes", "1"])
        cases = tune._cases([(8, 8)], args)[:1]
        assert tune._measure(cases, args)[0][0]["status"] == "left out"
        args.minutes = 10.0
        assert tune._measure(cases, args)[0][0]["status"] == "hung"

    @pytest.mark.parametrize(
        "arguments, words",
        [
            (["--shapes", "5"], "expected INxOUT"),
            (["--shapes", "5x-1"], "whole number"),
            (["--tokens", "abc"], "whole number"),
            (["--dropout", "nan"], "in \\[0, 1\\)"),
            (["--dropout", "1"], "in \\[0, 1\\)"),
        ],
    )
    def test_arguments_that_make_no_sense(self, arguments, words, capsys):
        with pytest.raises(SystemExit):
            tune.main(["--device", "cpu", *arguments])
        assert re.search(words, capsys.readouterr().err)

    def test_shapes_of_a_config_and_of_a_preset(self, tmp_path, capsys):
        config = tmp_path / "config.json"
        config.write_text(
            json.dumps(
                {
                    "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2,
                    "num_attention_heads": 8, "num_key_value_heads": 2,
                }
            )
        )  # fmt: skip
        args = tune._parser().parse_args(["--model-config", str(config)])
        assert tune._linears(args) == 2 * [
            (64, 64), (64, 16), (64, 16), (64, 64), (64, 172), (64, 172), (172, 64)
        ]  # fmt: skip
        args = tune._parser().parse_args(["--preset", "1.3b"])
        assert tune._linears(args).count((5461, 2048)) == 24
        sizes = json.loads(config.read_text())
        broken = [{"hidden_size": "64"}, {"num_attention_heads": 0}, {"head_dim": -8},
                  {"num_attention_heads": 5}, {"model_type": "phi3"}]  # fmt: skip
        for content in ({}, [1], 3, *({**sizes, **wrong} for wrong in broken)):
            config.write_text(json.dumps(content))
            assert tune.main(["--device", "cpu", "--model-config", str(config)]) == 2
        config.write_text("{")
        assert tune.main(["--device", "cpu", "--model-config", str(config)]) == 2
        assert f"expected JSON in {config}" in capsys.readouterr().err

    def test_a_cache_that_cannot_be_replaced_is_told_before_measuring(
        self, tmp_path, monkeypatch, capsys
    ):
        (tmp_path / "tune.json").mkdir()
        monkeypatch.setenv(evidence.CACHE_VARIABLE, str(tmp_path))
        monkeypatch.setattr(tune, "_measure", None)
        assert tune.main(["--device", "cpu", "--shapes", "24x40"]) == 1
        assert "the cache could not be written" in capsys.readouterr().err

    def test_an_interrupt_keeps_what_was_finished(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv(evidence.CACHE_VARIABLE, str(tmp_path))
        call, calls = tune.Worker.call, []

        def interrupted(self, *args):
            calls.append(args)
            if len(calls) == 12:  # after the product's rows, both forward and backward
                raise KeyboardInterrupt
            return call(self, *args)

        monkeypatch.setattr(tune.Worker, "call", interrupted)
        arguments = ["--device", "cpu", "--shapes", "24x40", "--tokens", "16", "--r", "4"]
        assert tune.main(arguments) == 130
        told = capsys.readouterr().out
        assert len(calls) == 12 and "left out: interrupted" in told
        [section] = json.loads((tmp_path / "tune.json").read_text())["devices"].values()
        found = {entry["op"] for entry in section["entries"]}
        assert found == {"lora_linear", "lora_linear backward"}


def test_the_identity_of_a_gpu(monkeypatch, tmp_path):
    driver = tmp_path / "version"
    driver.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
        "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n"
    )
    monkeypatch.setattr(evidence, "_DRIVER_FILE", driver)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    here = evidence.identity(torch.device("cuda", 0))
    assert (here["device"], here["capability"], here["driver"]) == (
        "Some GPU",
        "sm_90",
        "580.65.06",
    )
    assert here["torch"] == torch.__version__ and all(isinstance(v, str) for v in here.values())


def test_status_shows_the_evidence(cache, capsys):
    status._print_evidence(HERE)
    assert "none on record for Some GPU sm_90" in capsys.readouterr().out
    evidence.write(cache, HERE, [entry(["triton", "reference"])])
    status._print_evidence(HERE)
    out = capsys.readouterr().out
    assert f"cache {cache}" in out and "triton, reference" in out
    status._print_evidence({**HERE, "driver": "999"})
    assert "ignored: it was made with driver 580.1, and this is 999" in capsys.readouterr().out


def test_shipped_records_are_sound():
    """Every record in the package can be read and names a device and an order."""
    for path in sorted((Path(evidence.__file__).parent / "records").glob("*.json")):
        for section in evidence._read(path)["devices"].values():
            assert section["entries"] and all(map(evidence._is_entry, section["entries"]))
            assert "+" not in section["identity"]["package"]
