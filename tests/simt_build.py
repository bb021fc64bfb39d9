"""Compiles the CUDA sources with the host compiler, and stands the result in for relora_kernels._C."""

import contextlib
import ctypes
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
sys.path.insert(0, str(CSRC))
import cuda_build  # noqa: E402, F401

# -fno-gnu-unique: two libraries with the shim in one process must not share its variables.
HOST_FLAGS = (
    "-std=c++17 -O1 -g1 -fPIC -shared -fno-gnu-unique -ffp-contract=off -fno-strict-aliasing "
    "-fsanitize=undefined -fno-sanitize-recover=all -Wall -Wextra -Wno-unknown-pragmas -Werror"
).split()


def host_library(source: str, folder: Path, *includes: Path, flags=()) -> ctypes.CDLL:
    """tests/simt/`source` as a shared library in `folder`; skips the test where there is no g++.

    With TESTS / "simt" among the includes, the SIMT shim stands in for CUDA's runtime.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the CUDA sources for the host")
    out = folder / f"{source}.so"
    flags = [*HOST_FLAGS, *flags, *(f"-I{path}" for path in includes), f"-I{CSRC}"]
    done = subprocess.run(
        [compiler, *flags, str(TESTS / "simt" / source), "-o", str(out)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(out))


def put_in_place(monkeypatch, launcher, module) -> None:
    """Let relora_kernels/cuda's `launcher` run on CPU tensors, with `module` for relora_kernels._C."""
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
