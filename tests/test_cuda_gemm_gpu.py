"""The CUDA kernels of lora_linear on a GPU. A kernel that hangs must not hang the tests, so the cases run in a
separate program, gemm_program.py, which is killed if a case takes too long."""

import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

import gemm_program
import pytest
import torch

import relora_kernels
from relora_kernels.cuda import why_no_device

SECONDS_A_CASE = 90  # the first one's include importing torch
REASON = "needs a GPU" if not torch.cuda.is_available() else why_no_device(torch.device("cuda", 0))


def run(names: list[str], seconds: float, program) -> tuple[dict, str | None]:
    """({name: verdict}, how the program ended prematurely, or None)."""
    # The package that these tests import: if that is installed, the sources have no compiled kernels.
    package = Path(relora_kernels.__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, program, *names], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": f"{package}:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    lines = queue.Queue()

    def read():
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    verdicts, last = {}, ""
    while True:
        try:
            line = lines.get(timeout=seconds)
        except queue.Empty:
            process.kill()
            process.wait()
            return verdicts, f"nothing for {seconds} s: it hangs"
        if line is None:
            status = process.wait()
            return verdicts, None if status == 0 else f"exit status {status}: {last}"
        name, _, verdict = line.rstrip("\n").partition("\t")
        if name in names:
            verdicts[name] = verdict
        else:
            last = (last + line)[-2000:]


def run_all(
    names: list[str], seconds: float = SECONDS_A_CASE, program=gemm_program.__file__
) -> dict:
    """Name -> verdict. After a case that hangs or ends the program, the rest run in a new one."""
    found, pending = {}, list(names)
    while pending:
        verdicts, end = run(pending, seconds, program)
        found |= verdicts
        left = [name for name in pending if name not in found]
        if left and (end or not verdicts):
            found[left.pop(0)] = end or "no verdict"
        pending = left
    return found


@pytest.fixture(scope="module")
def verdicts() -> dict:
    return run_all(list(gemm_program.cases()))


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("name", gemm_program.cases() if REASON is None else ["every case"])
def test_on_a_gpu(name, verdicts):
    assert verdicts[name] == "ok"


def test_after_a_hang_or_a_crash_the_other_cases_go_on(tmp_path):
    """With a program that hangs at one name, dies at another and gives up its context at a third."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time\n"
        "for name in sys.argv[1:]:\n"
        "    if name == 'hangs': time.sleep(60)\n"
        "    if name == 'dies': sys.exit('out of luck')\n"
        "    print(name + '\\t' + ('CUDA error' if name == 'loses' else 'ok'), flush=True)\n"
        "    if name == 'loses': break\n"
    )
    names = ["one", "hangs", "two", "loses", "three", "dies", "four"]
    found = run_all(names, 3, program)
    assert list(found) == names
    assert all(found[name] == "ok" for name in ("one", "two", "three", "four"))
    assert found["hangs"] == "nothing for 3 s: it hangs" and found["loses"] == "CUDA error"
    assert found["dies"] == "exit status 1: out of luck\n"


def test_the_program_runs_the_package_that_the_tests_import(tmp_path, monkeypatch):
    """An installed package has compiled kernels, the sources beside these tests have none."""
    package, program = tmp_path / "relora_kernels/__init__.py", tmp_path / "tests/program.py"
    for file in (package, program):
        file.parent.mkdir()
        file.touch()
    program.write_text("import relora_kernels\nprint('where\\t' + relora_kernels.__file__)\n")
    monkeypatch.setattr(relora_kernels, "__file__", str(package))
    assert run(["where"], 60, program) == ({"where": str(package)}, None)
