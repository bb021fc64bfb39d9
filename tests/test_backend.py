"""Choosing a backend: by name, by environment, never silently; and the folder named triton."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import relora_kernels
from relora_kernels import BackendUnavailable, current_backend, merge_, use_backend
from relora_kernels import backend as backends

ROOT = Path(__file__).parents[1]


def python(code: str, cwd=ROOT, **environment) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RELORA_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**kept, **environment},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_use_backend_nests_and_restores(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    assert current_backend() == "auto"
    with use_backend("reference"):
        assert current_backend() == "reference"
        with pytest.raises(KeyError), use_backend("triton"):
            assert current_backend() == "triton"
            raise KeyError
        assert current_backend() == "reference"
    assert current_backend() == "auto"


def test_environment_variable(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    assert current_backend() == "reference"
    with use_backend("auto"):
        assert current_backend() == "auto"
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "fastest")
    with pytest.raises(
        ValueError,
        match="RELORA_KERNELS_BACKEND.*auto, reference, triton_mask, triton, triton_tma, cuda; got 'fastest'",
    ):
        current_backend()


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="got 'cublas'"), use_backend("cublas"):
        pass
    assert current_backend() in ("auto", os.environ.get(backends.ENVIRONMENT_VARIABLE))


def test_a_named_backend_says_why_it_cannot_serve_case7():
    x, w, a, b = torch.ones(2, 4), torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1)
    with (
        use_backend("cuda"),
        pytest.raises(BackendUnavailable, match="'cuda'.*python -m relora_kernels"),
    ):
        merge_(w, a, b, 1.0)
    with use_backend("cuda"), pytest.raises(BackendUnavailable, match="lora_linear: .*'cuda'"):
        relora_kernels.lora_linear(x, w, a, b, 1.0)
    assert w.eq(1).all()


def test_every_backend_of_an_op_offers_the_same_functions():
    from relora_kernels.ops import lora_linear, merge, prune

    for op, functions in (
        (lora_linear, ("why_not_forward", "why_not_backward", "forward", "backward")),
        (merge, ("why_not", "merge_")),
        (prune, ("why_not", "prune_")),
    ):
        assert "reference" in op.IMPLEMENTATIONS  # it serves every call
        for name, module in op.IMPLEMENTATIONS.items():
            assert name in backends.BACKENDS
            for function in functions:
                ours = getattr(module, function).__code__
                theirs = getattr(op.IMPLEMENTATIONS["reference"], function).__code__
                assert (
                    ours.co_varnames[: ours.co_argcount] == theirs.co_varnames[: theirs.co_argcount]
                )


class TestFolderNamedTriton:
    """It holds the Triton kernels and must never shadow the compiler package."""

    def test_it_is_no_package(self):
        assert not (ROOT / "triton" / "__init__.py").exists()

    @pytest.mark.skipif(
        backends.triton_missing() is not None, reason=str(backends.triton_missing())
    )
    @pytest.mark.parametrize("where", ["root", "elsewhere"])
    def test_import_triton_is_the_compiler(self, where, tmp_path):
        result = python(
            "import triton, triton.language; print(triton.__version__)\n"
            "import relora_kernels._triton.merge as m; print(m.__file__)",
            cwd=ROOT if where == "root" else tmp_path,
            PYTHONPATH="" if where == "root" else str(ROOT),
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[1].endswith("merge.py")

    def test_without_the_compiler_the_library_works_from_the_root(self):
        """Only the bare folder is visible: it must not count as Triton."""
        result = python(
            "import importlib.machinery, sys\n"
            "class Hide:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name == 'triton':\n"
            "            return importlib.machinery.PathFinder.find_spec(name, [sys.path[0] or '.'])\n"
            "sys.meta_path.insert(0, Hide())\n"
            "import torch, relora_kernels as rk\n"
            "from relora_kernels import backend\n"
            "print(backend.triton_missing())\n"
            "layer = rk.FusedReLoRaLinear(8, 8, r=2, dtype=torch.bfloat16)\n"
            "torch.compile(layer, fullgraph=True)(torch.ones(2, 8).bfloat16()).sum().backward()\n"
            "layer.zero_grad(); layer.merge(); print('merged', int(layer.merge_count))\n"
            "with rk.use_backend('triton'):\n"
            "    try: layer.merge()\n"
            "    except rk.BackendUnavailable as e: print(e)\n"
        )
        assert result.returncode == 0, result.stderr
        assert "not installed (pip install triton)" in result.stdout.splitlines()[0]
        assert "merged 1" in result.stdout and "'triton' was asked for" in result.stdout
        assert result.stdout.count("pip install triton") == 2


def test_importing_needs_no_gpu_and_is_silent():
    result = python("import relora_kernels; print(relora_kernels.__version__)")
    assert result.returncode == 0 and not result.stderr, result.stderr


def test_python_m_relora_kernels_tells_what_is_there():
    result = subprocess.run(
        [sys.executable, "-m", "relora_kernels"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    for words in (
        "relora_kernels",
        "torch",
        "lora_linear",
        "merge_",
        "prune_",
        "reference",
        "triton",
        "cuda",
    ):
        assert words in result.stdout


def test_blocks_that_overlap_end_cleanly(monkeypatch):
    """As in two threads: leaving one block must not end the other, nor leave a backend in force."""
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    first, second = use_backend("reference"), use_backend("cuda")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert current_backend() == "cuda"
    second.__exit__(None, None, None)
    assert current_backend() == "auto"


def test_blocks_of_many_threads_lose_none(monkeypatch):
    """Leaving a block drops that one alone, whatever other threads enter and leave meanwhile."""
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    interval, wrong, end = sys.getswitchinterval(), [], time.monotonic() + 0.5

    def enter_and_leave():
        try:
            while time.monotonic() < end:
                with use_backend("reference"):
                    if current_backend() != "reference":
                        wrong.append("lost")
                current_backend()
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=enter_and_leave) for _ in range(4)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong and current_backend() == "auto"


def test_a_block_within_compiled_code_is_refused_or_heeded():
    """Dynamo would drop the block, because ops choose their backend when the graph runs."""
    operands = torch.ones(2, 4), torch.ones(3, 4), torch.ones(2, 4), torch.ones(3, 2)

    def named():
        with use_backend("cuda"):
            return relora_kernels.lora_linear(*operands, 0.5)

    says = "cannot serve this call|outside of compiled code"
    if torch.__version__ < (
        2,
        13,
    ):  # 2.11 says of a raise in a full graph only that it has observed one
        says += "|Observed exception"
    for fullgraph in (False, True):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=says):
            torch.compile(named, backend="eager", fullgraph=fullgraph)()
