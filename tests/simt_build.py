"""Compiles the CUDA sources with the host compiler, and substitutes the result for relora_kernels._C."""

import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
sys.path.insert(0, str(CSRC))
import cuda_build  # noqa: E402, F401

HOST_FLAGS = "-std=c++17 -fPIC -shared -Wall -Wextra -Wno-unknown-pragmas -Werror".split()
# -fno-gnu-unique: two libraries with the shim in one process must not share its variables.
SIMT_FLAGS = "-O1 -g1 -fno-gnu-unique -ffp-contract=off -fno-strict-aliasing".split() + [
    f"-I{CSRC}"
]
UB_FLAGS = "-fsanitize=undefined -fno-sanitize-recover=all".split()


def once(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """The file that `make` writes. Of pytest-xdist's processes only the first that asks for it runs `make`."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    path, new = folder / name, folder / f"{name}.new"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            make(new)
            new.rename(path)
    return path


def host_library(tmp_path_factory, source: Path, *arguments) -> ctypes.CDLL:
    """`source` as a shared library; skips the test if there is no g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the CUDA sources for the host")
    command = [compiler, *HOST_FLAGS, *map(str, arguments), str(source)]

    def compile_(out: Path) -> None:
        done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    key = hashlib.sha256("\0".join(command).encode()).hexdigest()[:12]
    return ctypes.CDLL(str(once(tmp_path_factory, f"{source.stem}-{key}.so", compile_)))


def simt_library(tmp_path_factory, source: str, *flags: str) -> ctypes.CDLL:
    """tests/simt/`source` with the SIMT shim in place of CUDA's runtime."""
    return host_library(
        tmp_path_factory,
        TESTS / "simt" / source,
        *SIMT_FLAGS,
        *UB_FLAGS,
        *flags,
        f"-I{TESTS / 'simt'}",
    )


def races_library(tmp_path_factory, source: str, *flags: str) -> ctypes.CDLL:
    """The same, but the first race between two accesses aborts the process: tests/simt/races.h."""
    races = host_library(tmp_path_factory, TESTS / "simt" / "races.cpp", "-O2", "-DSIMT_RACES")
    return host_library(
        tmp_path_factory, TESTS / "simt" / source, *SIMT_FLAGS, *flags, f"-I{TESTS / 'simt'}",
        "-DSIMT_RACES", "-fsanitize=thread", "-fno-threadsafe-statics", "-Wno-maybe-uninitialized",
        "-fno-tree-loop-im",  # it would hoist loads above their conditions, into all threads
        "-nodefaultlibs", f"-Wl,--no-as-needed,{races._name}",
        "-lstdc++", "-lm", "-lc", "-lgcc_s", "-lgcc",
    )  # fmt: skip


def numerics_library(tmp_path_factory) -> ctypes.CDLL:
    """csrc/numerics.cuh alone, without the shim."""
    return host_library(tmp_path_factory, TESTS / "simt" / "numerics.cpp", *SIMT_FLAGS, *UB_FLAGS)


def put_in_place(monkeypatch, launcher, module) -> None:
    """Lets relora_kernels/cuda's `launcher` run on CPU tensors, with `module` in place of relora_kernels._C."""
    monkeypatch.setattr(launcher, "extension", lambda: (module, None))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_same_bits(actual, expected):
    """Bitwise, but any NaN equals any NaN."""
    assert torch.equal(actual.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(bits_of(actual)[number], bits_of(expected)[number])
