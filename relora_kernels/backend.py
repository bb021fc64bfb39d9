"""Which implementation serves a call: `reference`, `triton_mask`, `triton`, `triton_tma` or `cuda`.

Each op lists its implementations in ops/*.py as {backend name: module}. A module provides the function
itself and `why_not(...)` with the same signature: None if it can serve the call, else the reason in words.
`auto` first tries the backends on record for this kind of call on this device, fastest first (evidence.py),
then the dict in its order, and takes the first that can serve the call. A named backend that cannot raises.

The reference can serve every call (on a GPU it runs on cuBLAS), so without a record `auto` stops there.
Only `triton_mask` precedes it: with dropout it follows the same plan, with the same results, but draws the
mask in one pass. The other kernels have to be measured on this device as correct and faster, or be named.
`reference`, if named, is PyTorch alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

from relora_kernels import evidence

BACKENDS = ("reference", "triton_mask", "triton", "triton_tma", "cuda")
ENVIRONMENT_VARIABLE = "RELORA_KERNELS_BACKEND"


class _Block:
    """A use_backend block. Equality is identity, so `list.remove` runs no Python code and is atomic."""

    def __init__(self, name: str):
        self.name = name


# The open blocks. The last one entered wins, also over the environment variable.
_named: list[_Block] = []


class BackendUnavailable(RuntimeError):
    """The named backend cannot serve the call; the message says why and what to do."""


def current_backend() -> str:
    """The name in force: use_backend's, else RELORA_KERNELS_BACKEND's, else `auto`.

    Raises ValueError if the variable holds no backend's name.
    """
    return _checked(_asked_for() or "auto", ENVIRONMENT_VARIABLE)


def is_named(name: str) -> bool:
    """Whether use_backend or the environment asks for this backend."""
    return name == _asked_for()


def _asked_for() -> str | None:
    # A slice: another thread may end its block between a test for emptiness and an index.
    for block in _named[-1:]:
        return block.name
    return os.environ.get(ENVIRONMENT_VARIABLE)


@contextlib.contextmanager
def use_backend(name: str):
    """Within the block every op runs on backend `name`: auto, reference, triton_mask, triton, triton_tma
    or cuda.

    Process-wide, not per thread, because autograd runs the backward of CUDA tensors in its own threads.
    Compiled functions see it too: an op chooses its backend when it runs. If blocks of several threads
    overlap, the one entered last wins.

    Enter it around compiled functions: inside one it breaks the graph, which is an error with
    ``fullgraph=True``. Raises ValueError for any other name, and RuntimeError inside what torch.export
    traces. An op that `name` cannot serve raises BackendUnavailable when it is called; there is no fallback.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "use_backend: expected to be entered outside of compiled code, got a call within it, where it "
            "would do nothing; enter it around the call of the compiled function"
        )
    mine = _Block(_checked(name, "use_backend"))
    _named.append(mine)
    try:
        yield
    finally:
        _named.remove(mine)


def _checked(name: str, where: str) -> str:
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"{where}: expected one of auto, {', '.join(BACKENDS)}; got {name!r}")
    return name


def resolve(op: str, implementations: dict, why_not: str, *args):
    """The module of `implementations` that serves op(*args): the named one, or `auto`'s choice.

    Raises BackendUnavailable if the named backend cannot serve the call.
    """
    name = current_backend()
    if name == "auto":
        return _first_that_can(op, implementations, why_not, args)
    reason = reason_against(name, op, implementations, why_not, args)
    if reason is not None:
        raise BackendUnavailable(
            f"{op}: backend {name!r} was asked for and cannot serve this call: {reason}. "
            f"Use use_backend('auto') or unset {ENVIRONMENT_VARIABLE} to let the library "
            f"choose; `python -m relora_kernels` lists what each backend can do here"
        )
    return implementations[name]


def reason_against(name: str, op: str, implementations: dict, why_not: str, args) -> str | None:
    """Why backend `name` cannot serve op(*args); None if it can."""
    if name in implementations:
        return getattr(implementations[name], why_not)(*args)
    if name.startswith("triton") and triton_missing() is not None:
        return triton_missing()
    return f"{op} has no {name} implementation yet"


def _first_that_can(op: str, implementations: dict, why_not: str, args):
    for name in (*evidence.order(op, args), *implementations):
        module = implementations.get(name)  # None: on record, but no longer installed
        if module is not None and getattr(module, why_not)(*args) is None:
            return module
    raise AssertionError(f"{op}: the reference cannot serve this call")


@functools.cache
def triton_missing() -> str | None:
    """None if the Triton compiler is installed, else the reason in words."""
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed (pip install triton)"
    return None


def why_not_in_triton(tensor: torch.Tensor, kernel, name: str = "triton") -> str | None:
    """None if Triton can run `kernel`, of backend `name`, on `tensor`'s device, else the reason in words."""
    from triton import JITFunction

    if tensor.is_cuda or (not isinstance(kernel, JITFunction) and is_named(name)):  # interpreted
        return None
    return "the tensors are on a CPU (Triton runs there under TRITON_INTERPRET=1, by name only)"


@functools.cache
def triton_cannot_start() -> str | None:
    """None if Triton finds the compiler and headers it builds launchers with, else what is missing."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton starts kernels by a C compiler, and there is no CC, gcc or clang"
    header = Path(sysconfig.get_config_var("INCLUDEPY"), "Python.h")
    if not header.exists():
        return f"Triton starts kernels by Python's C headers, and there is no {header}"
    return None


def _hide_bare_folder() -> None:
    """Make `import triton` fail if it would find no more than a bare folder of that name.

    Run from this repository's root without the compiler installed, Python takes the folder triton/ for a
    package; torch would then import it and fail on its missing contents.
    """
    if "triton" not in sys.modules:
        spec = importlib.util.find_spec("triton")
        if spec is not None and spec.origin is None:
            sys.modules["triton"] = None


_hide_bare_folder()
