"""Run calls that may crash, hang or leave a GPU unusable, so that a failure costs only that call.

`Worker("module:function")` keeps one process that answers calls of function(argument); argument and result
are JSON. A process that dies, answers too late or raises is discarded, and the next call starts another,
because no CUDA context can be trusted after a failed kernel. Otherwise the process is reused, because
importing torch takes seconds.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

START_LIMIT_S = 120.0  # importing torch from a cold disk takes most of a minute
_PR_SET_PDEATHSIG = 1
# Drops the current directory, which Python puts first in sys.path: it may hold a copy of the sources.
_START = (
    "import sys\n"
    "if not sys.path[0]: del sys.path[0]\n"
    "from relora_kernels.worker import serve\n"
    "serve()"
)


class Worker:
    """call(argument, limit_s) -> {"status": "ok", "value": ...}, or {"status": "raised", "crashed" or "hung",
    "reason": words, "log": the end of what it printed}.

    `path`: folders to import from before all others. Next comes the one that this package was imported from;
    the current directory is never used. `environment`: variables to set; None drops one.
    """

    def __init__(self, target: str, path: list = (), environment: dict | None = None):
        self._target, self._process = target, None
        merged = {**os.environ, **(environment or {})}
        self._environment = {k: v for k, v in merged.items() if v is not None}
        here = str(Path(__file__).resolve().parents[1])
        inherited = filter(None, [os.environ.get("PYTHONPATH")])
        self._environment["PYTHONPATH"] = os.pathsep.join([*map(str, path), here, *inherited])

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def call(self, argument, limit_s: float) -> dict:
        """`limit_s` applies to the call alone; starting the process and its imports come on top."""
        if self._process is None:
            self._start()
            begun = self._answer(START_LIMIT_S)
            if begun["status"] != "ok":
                return begun
        try:
            self._process.stdin.write(json.dumps(argument) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: _answer finds the end of its output
        return self._answer(limit_s)

    def _answer(self, limit_s: float) -> dict:
        try:
            line = self._answers.get(timeout=limit_s)
        except queue.Empty:
            self.close()
            return self._failed("hung", f"no answer within {limit_s:.0f} s")
        if line is None:  # end of its output: it has died
            return self._failed("crashed", f"the process ended with {self.close()}")
        answer = json.loads(line)
        if answer["status"] == "ok":
            return answer
        self.close()
        return self._failed(**answer)

    def _failed(self, status: str, reason: str) -> dict:
        self._log.seek(0)
        return {"status": status, "reason": reason, "log": self._log.read()[-2000:]}

    def close(self) -> int | None:
        """End the process. Returns its exit status, negative for a signal, or None if it had to be killed."""
        process, self._process = self._process, None
        if process is None:
            return None
        try:
            process.stdin.close()
            # Reaps a process that has died. A live one is not waited for: it may hang.
            process.wait(timeout=0.2)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            pass
        status = process.poll()
        if status is None:
            os.killpg(process.pid, signal.SIGKILL)  # also the compilers it started
        process.wait()
        self._reader.join()
        process.stdout.close()
        return status

    def _start(self) -> None:
        self._log = tempfile.TemporaryFile("w+", errors="replace")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, self._target,
             str(os.getpid())],
            env=self._environment, text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip
        self._answers = queue.Queue()
        self._reader = threading.Thread(
            target=_read, args=(self._process.stdout, self._answers), daemon=True
        )
        self._reader.start()


def _read(stream, answers: queue.Queue) -> None:
    for line in stream:
        answers.put(line)
    answers.put(None)


def serve() -> None:
    """The worker's own process: one JSON line in, one out, until the input ends."""
    target, parent = sys.argv[1:3]
    die_with_the_parent(int(parent), signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the function prints must not look like an answer
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    answers.write(json.dumps({"status": "ok"}) + "\n")
    answers.flush()
    for line in sys.stdin:
        try:
            answer = {"status": "ok", "value": function(json.loads(line))}
        except Exception as error:
            traceback.print_exc()
            answer = {"status": "raised", "reason": f"{type(error).__name__}: {error}"[:2000]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def die_with_the_parent(parent: int, number: int) -> None:
    """Make the kernel send this process signal `number` when its parent, process `parent`, ends in any way,
    even if this process hangs or the parent is killed. Linux only."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)
