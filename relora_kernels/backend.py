"""Which implementation serves a call: `reference`, `triton_mask`, `triton`, `triton_tma` or `cuda`.

Each op lists its implementations in ops/*.py as {backend name: module}. A module offers, with one
signature, the function itself and `why_not(...)`: None where it can serve the call, else the reason
in words. `auto` takes the first that can, of those on record for this kind of call on this device, fastest
first (evidence.py), then in the order of the dict; a named backend that cannot raises.

Of the dict `auto` comes as far as the reference, which runs on cuBLAS on a GPU and can always serve. Before
it is what needs no record: with dropout `triton_mask`, the same plan with a mask drawn in one pass. A kernel
behind it that is not on record, on that device, as right and as faster serves by name alone. `reference` by
name is PyTorch alone.
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
    """A use_backend block; equal to itself alone, so that `remove` finds it in one step of any thread."""

    def __init__(self, name: str):
        self.name = name


# The blocks that are open. The last counts, over the environment variable.
_named: list[_Block] = []


class BackendUnavailable(RuntimeError):
    """A backend was named that cannot serve the call; the message says why and what to do."""


def current_backend() -> str:
    """The name in force: use_backend's, else RELORA_KERNELS_BACKEND's, else `auto`.

    Raises ValueError where the variable holds no backend's name.
    """
    return _checked(_asked_for() or "auto", ENVIRONMENT_VARIABLE)


def is_named(name: str) -> bool:
    """Whether use_backend or the environment asks for this backend."""
    return name == _asked_for()


def _asked_for() -> str | None:
    # A slice: between a test of the list and its last element another thread may end its block.
    for block in _named[-1:]:
        return block.name
    return os.environ.get(ENVIRONMENT_VARIABLE)


@contextlib.contextmanager
def use_backend(name: str):
    """Within the block every op runs on backend `name`: auto, reference, triton_mask, triton, triton_tma
    or cuda.

    Process-wide, not per thread: autograd runs the backward of CUDA graphs in threads of its own,
    which have to see it. Compiled graphs see it too, since ops choose when they run. Where blocks of
    several threads overlap, the one entered last counts.

    Raises ValueError for any other name, and RuntimeError within code that torch.compile compiles whole,
    which would leave the block out: enter it around the call. An op that `name` cannot serve raises
    BackendUnavailable when it is called; nothing falls back.
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
    """The module of `implementations` that serves op(*args): the named one, or `auto`'s first.

    Raises BackendUnavailable where the named backend cannot.
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
    """Why backend `name` cannot serve op(*args); None where it can."""
    if name in implementations:
        return getattr(implementations[name], why_not)(*args)
    if name.startswith("triton") and triton_missing() is not None:
        return triton_missing()
    return f"{op} has no {name} implementation yet"


def _first_that_can(op: str, implementations: dict, why_not: str, args):
    for name in (*evidence.order(op, args), *implementations):
        module = implementations.get(name)  # None: on record, and not installed any more
        if module is not None and getattr(module, why_not)(*args) is None:
            return module
    raise AssertionError(f"{op}: the reference cannot serve this call")


@functools.cache
def triton_missing() -> str | None:
    """None where the Triton compiler is installed, else the reason in words."""
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed (pip install triton)"
    return None


def why_not_in_triton(tensor: torch.Tensor, kernel, name: str = "triton") -> str | None:
    """None where Triton can run `kernel`, of backend `name`, on `tensor`'s device, else the reason in words."""
    from triton import JITFunction

    if tensor.is_cuda or (not isinstance(kernel, JITFunction) and is_named(name)):  # interpreted
        return None
    return "the tensors are on a CPU (Triton runs there under TRITON_INTERPRET=1, by name only)"


@functools.cache
def triton_cannot_start() -> str | None:
    """None where Triton finds what it builds a kernel's launcher with, else what is missing."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton starts kernels by a C compiler, and there is no CC, gcc or clang"
    header = Path(sysconfig.get_config_var("INCLUDEPY"), "Python.h")
    if not header.exists():
        return f"Triton starts kernels by Python's C headers, and there is no {header}"
    return None


def _hide_bare_folder() -> None:
    """Let `import triton` fail where all it would find is a bare folder of that name.

    From this repository's root, without the compiler installed, Python takes the folder triton/ for a
    package; torch would then import it and trip over its missing contents.
    """
    if "triton" not in sys.modules:
        spec = importlib.util.find_spec("triton")
        if spec is not None and spec.origin is None:
            sys.modules["triton"] = None


_hide_bare_folder()
