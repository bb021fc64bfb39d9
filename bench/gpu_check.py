"""python bench/gpu_check.py --minutes 8: everything that a GPU has to settle, in one command.

Builds the kernels for this GPU, runs the GPU tests, in four steps, and every CUDA kernel under
compute-sanitizer where that is on PATH (memcheck and racecheck of tests/sanitizer_program.py). Then checks
and times every backend beside the peers' formulas (common.by_worth: what matters most first), and writes
bench/results/<device>.json after each case. Each step of tests and each case runs in another process with a time
limit, so a crash, a hang or a broken CUDA context loses that one alone. Started again on the same commit it
goes on with the steps that have not passed and the cases that are missing. At the end: the bars that
the project sets itself, met or not. With --only merge prune it is done in a few minutes, and writes
<device>-merge-prune.json.

Needs no network: the build takes setuptools, ninja, pybind11 and nvcc from this machine, and goes to
build/gpu_check.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUILT = (
    ROOT / "build" / "gpu_check"
)  # what is measured is installed here; the environment's packages stay unchanged
BUILD = [
    sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--upgrade",
    "--target", str(BUILT.relative_to(ROOT)), ".",
]  # fmt: skip
TESTS = [
    sys.executable, "-m", "pytest", "-v", "--no-header", "--import-mode=importlib", "-p",
    "no:cacheprovider",
]  # fmt: skip
SUBJECTS = ("linear", "merge", "prune", "train")
# Step -> test files. Tests that could hang have a step of their own, last; the others share steps, since each
# start of pytest takes seconds.
TEST_STEPS = {
    "cuda_merge": ["cuda_merge"],
    "cuda_prune": ["cuda_prune_gpu"],
    "ops": ["lora_linear", "merge", "prune", "layer", "optimizer", "triton", "triton_mask"],
    "cuda_gemm": ["cuda_gemm_gpu"],
}
# Steps of one subject; the others belong to all.
STEP_SUBJECTS = {"cuda_merge": "merge", "cuda_prune": "prune", "cuda_gemm": "linear"}
SANITIZER_PARTS = {  # of tests/sanitizer_program.py
    "linear": ["linear"],
    "merge": ["merges", "streamed_merges", "many_tiles", "lists"],
    "prune": ["prunes", "windows", "random_prunes", "counts"],
    "train": [],
}
SANITIZER = "compute-sanitizer"
SANITIZER_TOOLS = ("memcheck", "racecheck")
BUILD_LIMIT_S = 240.0
# Largest shares of the remaining time: for all tests, then for both tools. No step is started with
# less than LEAST_S. On an H200 (2026-11-28), memcheck of merge and prune took 15 s, racecheck of
# merges, without the lists of them, 21 s.
TESTS_SHARE, SANITIZER_SHARE, LEAST_S = 0.25, 0.25, 10.0
# For one case: check and timing; the first case of an op and row also compiles its kernels.
FIRST_LIMIT_S, CASE_LIMIT_S = 90.0, 30.0
# For the workers: a backend named in this environment must not affect a measurement.
WORKER_ENVIRONMENT = {"RELORA_KERNELS_BACKEND": None}


def main(arguments: list[str] | None = None, target: str = "common:run_case", cases=None) -> int:
    """Exit status: 0 if what there was time for was measured, 2 if nothing can be measured here, 130 if
    interrupted.

    `target`, `cases`: the function that the workers call, and its arguments; for tests of this script.
    """
    args = _parser().parse_args(arguments)
    if not 0 < args.minutes < float("inf"):
        _parser().error(f"--minutes: expected a number above 0, got {args.minutes}")
    args.only = [subject for subject in SUBJECTS if subject in args.only]
    if args.ship and args.device == "cpu":
        _parser().error("--ship: expected --device cuda; `auto` never looks a CPU up")
    if args.ship and args.only:
        _parser().error("--ship: expected all cases, since a record is of one run; got --only")
    try:  # before the build and the tests, not after them
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"gpu_check: expected --output to be a folder: {error}", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * args.minutes
    steps: dict[str, dict] = {}
    if "build" not in args.skip and args.device == "cuda":
        limit = min(BUILD_LIMIT_S, deadline - time.monotonic())
        steps["build"] = run_step(
            BUILD, ROOT, limit, RELORA_KERNELS_ARCHS="native", RELORA_KERNELS_CUDA="on"
        )
    built = steps.get("build", {}).get("status") == "ok"
    path = [HERE, BUILT if built else ROOT]  # without a build: the sources, and no CUDA C++
    sys.path[:0] = [str(folder) for folder in path]
    from relora_kernels.evidence import write_json
    from relora_kernels.worker import Worker

    with Worker(target, path, WORKER_ENVIRONMENT) as worker:
        answer = worker.call({"kind": "machine", "device": args.device}, FIRST_LIMIT_S)
        if answer["status"] != "ok":
            print(f"gpu_check: {answer['reason']}\n{answer['log']}", file=sys.stderr)
            return 2
        machine = answer["value"]
        file = args.output / f"{slug(' '.join([machine['device'], *args.only]))}.json"
        results = resume(file, machine)
        results["only"] = args.only
        results["steps"].update(steps)
        write_json(file, results)
        try:
            if args.device == "cuda":
                # The tests run on the GPU in processes of their own: free the worker's memory for them.
                worker.close()
                found_at = {"PYTHONPATH": os.pathsep.join(map(str, path))}
                for kind, (share, commands, environment) in CHECKS.items():
                    if kind not in args.skip:
                        limit = share * (deadline - time.monotonic())
                        for _ in run_steps(
                            commands(args.only), results["steps"], limit, **environment, **found_at
                        ):
                            write_json(file, results)
            wanted = list_cases(args.device, args.only) if cases is None else cases
            left_out = measure(worker, wanted, results, file, deadline, write_json)
        except KeyboardInterrupt:
            print(f"\ngpu_check: interrupted; {file} holds what was measured", file=sys.stderr)
            return 130
    finish(results, file, write_json, args, left_out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it; default: 8")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of the JSON")
    parser.add_argument(
        "--skip", nargs="+", choices=("build", *CHECKS), default=[], help="what to leave out"
    )
    parser.add_argument(
        "--only", nargs="+", choices=SUBJECTS, default=[], metavar="SUBJECT",
        help=f"cases of these alone, and tests but other subjects' own: {', '.join(SUBJECTS)}",
    )  # fmt: skip
    parser.add_argument(
        "--ship", action="store_true",
        help="also write relora_kernels/records/<device>.json, the evidence that `auto` follows on "
        "this device wherever the package is installed",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda",
        help="cpu tries the command out on tiny shapes",
    )  # fmt: skip
    return parser


def tests(only: list[str]) -> dict[str, list[str]]:
    """Step -> command."""
    return {
        f"tests {step}": [*TESTS, *(str(ROOT / "tests" / f"test_{name}.py") for name in files)]
        for step, files in TEST_STEPS.items()
        if not only or STEP_SUBJECTS.get(step, only[0]) in only
    }


def sanitizer(only: list[str]) -> dict[str, list[str] | str]:
    """Step -> command, or why there is none. A step per tool and subject: passed ones are not rerun."""
    found = shutil.which(SANITIZER)
    return {
        f"sanitizer {tool} {subject}": f"{SANITIZER} is not on PATH" if found is None else [
            # torch makes API calls that fail on purpose; failed launches raise anyway.
            found, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no",
            sys.executable, str(ROOT / "tests" / "sanitizer_program.py"), *parts,
        ]
        for tool in SANITIZER_TOOLS
        for subject, parts in SANITIZER_PARTS.items()
        if parts and subject in (only or SUBJECTS)
    }  # fmt: skip


# Kind -> (share of the remaining time, commands, environment variables).
CHECKS = {
    "tests": (TESTS_SHARE, tests, {}),
    # Each tensor gets an allocation of its own: the sanitizer sees no bounds within one.
    "sanitizer": (SANITIZER_SHARE, sanitizer, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
}


def run_steps(commands: dict, steps: dict, limit_s: float, **environment: str) -> Iterator[str]:
    """Run the commands that have not passed, those without a verdict first; yields each name when
    `steps` has its result. A hanging one may use half of the remaining time (the last one, all)."""
    deadline = time.monotonic() + limit_s
    waiting = [name for name in commands if steps.get(name, {}).get("status") != "ok"]
    waiting.sort(key=lambda name: steps.get(name, {}).get("status") in ("failed", "hung"))
    for i, name in enumerate(waiting):
        command, left = commands[name], deadline - time.monotonic()
        if isinstance(command, str):
            steps[name] = {"status": "unavailable", "seconds": 0.0, "last_line": command}
        elif left >= LEAST_S:
            limit = left if i == len(waiting) - 1 else max(left / 2, LEAST_S)
            steps[name] = run_step(command, HERE, limit, **environment)
        elif steps.get(name, {}).get("status") not in ("failed", "hung"):
            steps[name] = {"status": "left out", "seconds": 0.0, "last_line": "for lack of time"}
        yield name


def list_cases(device: str, only: list[str]) -> list[dict]:
    """The worker's cases: every row of every problem, then train steps; of `only`, if any."""
    import common
    import peers
    import train_step

    gpu = device == "cuda"
    rows = [
        {
            "kind": "row", "name": f"{problem.name} - {row}", "row": row, "group": problem.name,
            "problem": problem.to_dict(), "seconds": 0.1,
        }
        for problem in common.by_worth(gpu)
        for row in peers.rows(problem)
    ]  # fmt: skip

    def subject(case: dict) -> str:
        return case["problem"]["kind"].lower() if case["kind"] == "row" else case["kind"]

    cases = rows + train_step.cases(gpu)
    return [{**case, "device": device} for case in cases if not only or subject(case) in only]


def measure(worker, cases: list[dict], results: dict, file: Path, deadline: float, write) -> int:
    """Call the worker for each case that is not in `results`; returns how many were left out."""
    missing = [case for case in cases if case["name"] not in results["cases"]]
    compiled = set()
    for i, case in enumerate(missing):
        left = deadline - time.monotonic()
        if left <= 0:
            return len(missing) - i
        start = time.monotonic()
        kernels = case.get("problem", {}).get("kind"), case["row"]
        limit = case.get("limit_s", CASE_LIMIT_S if kernels in compiled else FIRST_LIMIT_S)
        compiled.add(kernels)
        answer = worker.call(case, min(limit, left))
        if answer["status"] == "hung" and left < limit:
            return len(missing) - i  # cut off by --minutes: no verdict on the case
        record = answer["value"] if answer["status"] == "ok" else answer
        if "log" in record:
            record["log"] = without_paths(record["log"])
        record = {**case, **record, "took_s": time.monotonic() - start}
        results["cases"][case["name"]] = record
        write(file, results)
        outcome = record["status"]
        if outcome == "ok" and "median_s" in record:
            outcome = f"{1e3 * record['median_s']:.4g} ms"
        elif outcome not in ("ok", "unavailable"):
            outcome += f": {record['reason']}"
        print(f"[{i + 1}/{len(missing)}] {case['name']}: {outcome}", flush=True)
    return 0


def resume(file: Path, machine: dict) -> dict:
    """The results in `file`, if of the same commit, kernels, device and driver; else empty ones."""
    empty = {
        "machine": machine,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "steps": {},
        "cases": {},
        "bars": [],
    }
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
        same = {**earlier["machine"], "rates": 0} == {**machine, "rates": 0}
        # With a +, files differ from the commit: it does not identify what was measured.
        return {**empty, **earlier} if same and not machine["commit"].endswith("+") else empty
    except (OSError, ValueError, KeyError, TypeError):
        return empty


def finish(results: dict, file: Path, write, args, left_out: int) -> None:
    import dataclasses

    import report

    loaded = report.load(file)
    bars = report.bars(loaded)
    results["bars"] = [dataclasses.asdict(bar) for bar in bars]
    write(file, results)
    for name, step in results["steps"].items():
        print(f"{name}: {step['status']} in {step['seconds']:.0f} s; {step['last_line']}")
    counts: dict[str, int] = {}
    for record in results["cases"].values():
        counts[record["status"]] = counts.get(record["status"], 0) + 1
    print(f"\n{loaded.source}\ncases: {counts}; left out for lack of time: {left_out}\n")
    print(report.bars_table(bars))
    print(f"wrote {file}")
    if args.ship:
        print(f"wrote {ship(results) or 'no record: no row of ours passed'}")


def ship(results: dict) -> Path | None:
    """Write the evidence for `auto` into the package's own folder, from the groups in which no row of
    ours is missing. Returns its path, or None if there is none."""
    from relora_kernels import evidence, problems

    records = [record for record in results["cases"].values() if record["kind"] == "row"]
    for problem in {record["group"]: record["problem"] for record in records}.values():
        problem = problems.from_dict(problem)
        have = {record["row"] for record in records if record["group"] == problem.name}
        records += [
            {"group": problem.name, "row": row, "status": "left out"}
            for row in problem.ours()
            if row not in have
        ]
    here = {k: v for k, v in results["machine"].items() if isinstance(v, str)}
    path = ROOT / "relora_kernels" / "records" / f"{slug(here['device'])}.json"
    found = problems.entries(records)
    if not found:
        return None
    path.unlink(missing_ok=True)  # evidence of one run, not of several
    evidence.write(path, here, found)
    return path


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def without_paths(text: str) -> str:
    """Hide where this machine keeps its files: results are published."""
    for folder, name in ((ROOT, "."), (Path(sys.prefix), "<python>"), (Path.home(), "~")):
        text = text.replace(str(folder), name)
    return text


def run_step(command: list[str], folder: Path, limit_s: float, **environment: str) -> dict:
    """Run a command in its own process group: {status: ok, failed or hung, seconds, log, ...}."""
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=folder, env={**os.environ, **environment}, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        log, _ = process.communicate(timeout=max(limit_s, 1.0))
        status = "ok" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        log, _ = process.communicate()
        status = "hung"
    except BaseException:  # Ctrl-C reaches only this process
        os.killpg(process.pid, 9)
        process.wait()
        raise
    lines = [line for line in log.splitlines() if line.strip()]
    return {
        "status": status,
        "command": without_paths(" ".join([Path(command[0]).name, *command[1:]])),
        "exit_status": process.returncode,
        "seconds": time.monotonic() - start,
        "last_line": without_paths(lines[-1][:200]) if lines else "",
        "log": "" if status == "ok" else without_paths(log[-4000:]),
    }


if __name__ == "__main__":
    sys.exit(main())
