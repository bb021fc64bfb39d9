"""csrc/cuda_build.py: its decisions with a faked machine, and what it ships. No network."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from relora_kernels import cuda

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "csrc"))
import cuda_build  # noqa: E402

KNOBS = ("RELORA_KERNELS_CUDA", "RELORA_KERNELS_ARCHS", "MAX_JOBS", "CUDA_HOME", "CUDA_PATH")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with no nvcc and no driver; tests add what they need."""
    for name in KNOBS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin")
    monkeypatch.setattr(cuda_build, "TOOLKIT", tmp_path / "no-toolkit")
    monkeypatch.setattr(cuda_build, "DRIVER_FILE", tmp_path / "no-driver")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site-packages")])
    assert cuda_build.find_nvcc() is None
    return tmp_path


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def fake_nvcc(path: Path, archs="80 90 120") -> Path:
    """Answers questions like nvcc; compiling fails."""
    return script(
        path,
        'case "$*" in\n'
        f"*--list-gpu-arch*) for a in {archs}; do echo compute_$a; done;;\n"
        '*--version*) echo "Cuda compilation tools, release 13.0, V13.0.88";;\n'
        '*--dryrun*) echo "#\\$ _HERE_=$(dirname "$0")" >&2;;\n'
        "*) echo 'ptxas fatal: broken on purpose'; exit 3;;\nesac\n",
    )


def driver(machine: Path, monkeypatch, version: str, flavour="UNIX x86_64 Kernel Module") -> None:
    file = machine / "version"
    file.write_text(
        f"NVRM version: NVIDIA {flavour}  {version}  Sun Jul 20 19:44:48 UTC 2025\n"
        "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n"
    )
    monkeypatch.setattr(cuda_build, "DRIVER_FILE", file)


# ---- Knobs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, function",
    [
        ("RELORA_KERNELS_CUDA", "yes", "mode"),
        ("MAX_JOBS", "0", "jobs"),
        ("MAX_JOBS", "two", "jobs"),
    ],
)
def test_invalid_knobs_name_expected_and_got(machine, monkeypatch, name, value, function):
    monkeypatch.setenv(name, value)
    with pytest.raises(cuda_build.KnobError, match=f"{name}: expected .*, got '{value}'"):
        getattr(cuda_build, function)()


def test_knobs_have_defaults(machine, monkeypatch):
    assert cuda_build.mode() == "auto" and cuda_build.jobs() == os.cpu_count()
    monkeypatch.setenv("MAX_JOBS", "3")
    assert cuda_build.jobs() == 3


def test_archs_are_filtered_by_what_nvcc_knows(machine, monkeypatch):
    nvcc = fake_nvcc(machine / "bin/nvcc", "75 80 90 100 121")
    assert cuda_build.archs(nvcc) == ["80", "90", "100"]
    monkeypatch.setenv("RELORA_KERNELS_ARCHS", "80;90a;100f")
    assert cuda_build.archs(nvcc) == ["80", "90a", "100f"]


@pytest.mark.parametrize(
    "value", ["8.0", "sm_80", "80,90", "130", "80;", "90b", "Native", "75", "80a", "90f", "90\n"]
)
def test_archs_that_cannot_be_built_are_refused(machine, monkeypatch, value):
    nvcc = fake_nvcc(machine / "bin/nvcc", "75 80 90 120")
    monkeypatch.setenv("RELORA_KERNELS_ARCHS", value)
    with pytest.raises(cuda_build.KnobError, match="expected .* out of 80, 90, 120 .* got"):
        cuda_build.archs(nvcc)


def test_native_archs_come_from_the_gpus(machine, monkeypatch):
    nvcc = fake_nvcc(machine / "bin/nvcc")
    monkeypatch.setenv("RELORA_KERNELS_ARCHS", "native")
    with pytest.raises(cuda_build.KnobError, match="native: no GPU to ask: nvidia-smi"):
        cuda_build.archs(nvcc)
    script(machine / "bin/nvidia-smi", "echo 12.0; echo 7.5; echo 9.0; echo 9.0\n")
    assert cuda_build.archs(nvcc) == ["90", "120"]
    script(machine / "bin/nvidia-smi", "echo 7.5\n")
    with pytest.raises(cuda_build.KnobError, match="a GPU of sm_80 or newer, got 75"):
        cuda_build.archs(nvcc)


def test_ptx_of_the_highest_plain_arch():
    flags = cuda_build.arch_flags(["100", "90a", "80"])
    assert flags == ["-gencode=arch=compute_80,code=[sm_100,sm_90a,sm_80,compute_80]"]
    assert cuda_build.arch_flags(["90a", "100"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=[sm_100,compute_100]",
    ]
    assert cuda_build.arch_flags(["90a"]) == ["-gencode=arch=compute_90a,code=sm_90a"]


def test_ptx_of_its_own_from_where_a_source_uses_more():
    """Overlapping launches are compiled in from compute_90 on; sm_90 would not get them from compute_80's PTX."""
    assert cuda_build.arch_flags(["80", "120", "90"], 90) == [
        "-gencode=arch=compute_80,code=[sm_80,compute_80]",
        "-gencode=arch=compute_90,code=[sm_120,sm_90,compute_90]",
    ]
    for names in (["90"], ["80", "86"]):
        assert cuda_build.arch_flags(names, 90) == cuda_build.arch_flags(names)


def test_what_a_source_is_compiled_for():
    names = ["80", "86", "90", "120"]
    archs = cuda_build.source_archs
    assert archs(Path("two_segment_sm80.cu"), names) == names
    assert archs(Path("two_segment_sm90.cu"), names) == ["90a"]
    assert archs(Path("prune.cu"), names) == ["80", "90", "120"]  # sm_80's code runs on 8.6
    assert archs(Path("prune.cu"), ["86", "120"]) == ["86", "120"]  # and not the other way
    assert archs(Path("merge_sm90.cu"), ["80"]) == []


# ---- Finding nvcc -------------------------------------------------------------------------------


def test_nvcc_is_looked_for_in_this_order(machine, monkeypatch):
    pypi = fake_nvcc(machine / "site-packages/nvidia/cu13/bin/nvcc")
    assert cuda_build.find_nvcc() == pypi
    toolkit = fake_nvcc(machine / "toolkit/bin/nvcc")
    monkeypatch.setattr(cuda_build, "TOOLKIT", machine / "toolkit")
    assert cuda_build.find_nvcc() == toolkit
    on_path = fake_nvcc(machine / "bin/nvcc")
    assert cuda_build.find_nvcc() == on_path
    cuda_path = fake_nvcc(machine / "path/bin/nvcc")
    monkeypatch.setenv("CUDA_PATH", str(machine / "path"))
    assert cuda_build.find_nvcc() == cuda_path
    monkeypatch.setenv("CUDA_HOME", str(machine / "home"))  # a home without nvcc is passed over
    assert cuda_build.find_nvcc() == cuda_path
    assert cuda_build.find_nvcc() != fake_nvcc(machine / "home/bin/nvcc") == cuda_build.find_nvcc()


def test_a_wrapper_is_asked_for_its_toolkit(machine):
    real = fake_nvcc(machine / "somewhere/cuda/bin/nvcc")
    wrapper = script(machine / "bin/nvcc", f'exec {real} "$@"\n')
    assert cuda_build.find_nvcc() == wrapper
    assert cuda_build.toolkit_root(wrapper) == machine / "somewhere/cuda"


# ---- What the backend asks pip for --------------------------------------------------------------

TOOLS = ["ninja", "pybind11"]


def requirements(monkeypatch, mode):
    monkeypatch.setenv("RELORA_KERNELS_CUDA", mode)
    wheel = cuda_build.get_requires_for_build_wheel()
    assert wheel == cuda_build.get_requires_for_build_editable()
    return wheel


def test_requirements_with_nvcc(machine, monkeypatch):
    fake_nvcc(machine / "bin/nvcc")
    assert requirements(monkeypatch, "auto") == TOOLS
    assert requirements(monkeypatch, "on") == TOOLS
    assert requirements(monkeypatch, "off") == []


def test_requirements_without_nvcc(machine, monkeypatch, capsys):
    assert requirements(monkeypatch, "on") == [*TOOLS, cuda_build.PYPI_NVCC]
    assert requirements(monkeypatch, "off") == []
    assert capsys.readouterr().out == ""
    assert requirements(monkeypatch, "auto") == []
    assert "without CUDA kernels: no nvcc found, and no NVIDIA driver" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flavour", ["UNIX x86_64 Kernel Module", "UNIX Open Kernel Module for x86_64"]
)
def test_requirements_with_a_driver_and_no_nvcc(machine, monkeypatch, capsys, flavour):
    driver(machine, monkeypatch, "580.65.06", flavour)
    assert requirements(monkeypatch, "auto") == [*TOOLS, cuda_build.PYPI_NVCC]
    driver(machine, monkeypatch, "575.57.08", flavour)
    assert requirements(monkeypatch, "auto") == []
    assert "needs an NVIDIA driver >= 580, got 575" in capsys.readouterr().out


def test_the_other_hooks_are_setuptools(machine):
    build_meta = pytest.importorskip("setuptools.build_meta")
    assert cuda_build.build_sdist == build_meta.build_sdist
    assert cuda_build.build_editable == build_meta.build_editable


# ---- What ends up in the package ----------------------------------------------------------------


@pytest.fixture
def package(tmp_path):
    stale = tmp_path / "relora_kernels" / "_C.cpython-39-x86_64-linux-gnu.so"
    stale.parent.mkdir()
    stale.write_text("not a library")
    return stale.parent


def note_of(package) -> str:
    assert [path.name for path in package.iterdir()] == ["_C.missing.txt"]  # stale _C is gone
    return (package / "_C.missing.txt").read_text()


def test_off_leaves_a_note(machine, monkeypatch, package):
    monkeypatch.setenv("RELORA_KERNELS_CUDA", "off")
    cuda_build.build_into(package, machine / "work")
    assert "RELORA_KERNELS_CUDA=off" in note_of(package)


def test_no_nvcc_is_a_note_or_an_error(machine, monkeypatch, package):
    cuda_build.build_into(package, machine / "work")
    assert "no nvcc found" in note_of(package)
    driver(machine, monkeypatch, "580.65.06")  # no build isolation, so nothing was fetched
    cuda_build.build_into(package, machine / "work")
    assert "install a CUDA toolkit, or 'cuda-toolkit[nvcc" in note_of(package)
    monkeypatch.setenv("RELORA_KERNELS_CUDA", "on")
    with pytest.raises(cuda_build.BuildError, match="RELORA_KERNELS_CUDA=on: no nvcc found"):
        cuda_build.build_into(package, machine / "work")


def test_a_failed_build_is_a_note_or_an_error(monkeypatch, package, tmp_path):
    pytest.importorskip("pybind11")
    pytest.importorskip("ninja")
    for name in KNOBS:
        monkeypatch.delenv(name, raising=False)
    nvcc = fake_nvcc(tmp_path / "home/bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    cuda_build.build_into(package, tmp_path / "work")
    note = note_of(package)
    assert f"the build with {nvcc} failed" in note and "ptxas fatal: broken on purpose" in note
    monkeypatch.setenv("RELORA_KERNELS_CUDA", "on")
    (package / "_C.earlier.so").write_text("")
    with pytest.raises(cuda_build.BuildError, match="broken on purpose"):
        cuda_build.build_into(package, tmp_path / "work")
    assert (package / "_C.earlier.so").exists()


@pytest.mark.parametrize("name", ["RELORA_KERNELS_ARCHS", "MAX_JOBS"])
def test_a_bad_knob_is_an_error_in_auto_too(machine, monkeypatch, package, name):
    fake_nvcc(machine / "bin/nvcc")
    monkeypatch.setenv(name, "many")
    with pytest.raises(cuda_build.KnobError, match=f"{name}: expected"):
        cuda_build.build_into(package, machine / "work")
    assert [path.suffix for path in package.iterdir()] == [".so"]  # what was there is kept


def test_wheel_and_sdist_hold_the_triton_kernels_and_no_stale_module(tmp_path):
    """The wheel is built from the unpacked sdist, where the link is a plain folder."""
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    names = (
        "csrc relora_kernels triton setup.py pyproject.toml MANIFEST.in LICENSE README.md".split()
    )
    for path in (ROOT / name for name in names):
        if path.is_dir():
            unwanted = shutil.ignore_patterns("__pycache__", "_C.*")
            shutil.copytree(path, source / path.name, symlinks=True, ignore=unwanted)
        elif path.exists():
            shutil.copy2(path, source)
    stale = source / "relora_kernels" / "_C.cpython-311-x86_64-linux-gnu.so"
    stale.write_text("not a library")
    hook = "import sys, cuda_build; print(getattr(cuda_build, sys.argv[1])(sys.argv[2]))"
    environment = {**os.environ, "RELORA_KERNELS_CUDA": "off"}

    def build(what: str, folder: Path) -> Path:
        done = subprocess.run(
            [sys.executable, "-c", hook, what, str(tmp_path)],
            cwd=folder,
            env={**environment, "PYTHONPATH": str(folder / "csrc")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return tmp_path / done.stdout.split()[-1]

    shutil.unpack_archive(build("build_sdist", source), tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert not list(unpacked.rglob("*.so"))
    for suffix in ("", "/relora_kernels"):
        left_over = unpacked / f"build/lib{suffix}" / stale.name  # of an earlier build
        left_over.parent.mkdir(parents=True, exist_ok=True)
        left_over.write_text("not a library")
    content = zipfile.ZipFile(build("build_wheel", unpacked)).namelist()
    kernels = {path.name for path in (ROOT / "triton").glob("*.py")}
    assert kernels <= {
        Path(name).name for name in content if name.startswith("relora_kernels/_triton/")
    }
    assert "relora_kernels/_C.missing.txt" in content and "relora_kernels/cuda/merge.py" in content
    assert not [name for name in content if name.endswith(".so")]
    top = {name.split("/")[0] for name in content}
    assert top == {"relora_kernels", next(t for t in top if t.endswith(".dist-info"))}


# ---- The module itself --------------------------------------------------------------------------


def test_the_module_builds_imports_without_a_gpu_and_names_a_failed_launch(tmp_path, monkeypatch):
    nvcc = cuda_build.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc on this machine")
    pytest.importorskip("pybind11")
    pytest.importorskip("ninja")
    monkeypatch.setenv("RELORA_KERNELS_ARCHS", "80")
    module = cuda_build.compile_module(nvcc, tmp_path)
    use = (
        "import _C; print(_C.archs, _C.ptx, _C.nvcc_version, _C.cudart_version)\n"
        f"assert _C.sources == {cuda_build.sources_digest()!r} and not _C.merge_has_sm90\n"
        "import struct\n"
        "layer = struct.pack('18q4q2Q2q2f4I', *[0] * 18, 5, 7, 3, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0)\n"
        "assert len(layer) == _C.merge_layer_bytes\n"
        "def call(layers=bytearray(layer), **changes):\n"
        "    _C.merge(**{**dict(layers=layers, weight_dtype='bfloat16',\n"
        "        factor_dtype='float32', restart_dtype='float32', rounding='nearest', table=0, kind='streamed',\n"
        "        device=0, stream=0), **changes})\n"
        "for changes in ({}, dict(kind='sm90', table=64), dict(kind='sm90'), dict(rounding='up'), dict(rounding='compensated'), dict(layers=bytearray(layer * 17)),\n"
        "                dict(layers=bytearray(9))):\n"
        "    try: call(**changes)\n"
        "    except (RuntimeError, ValueError) as error: print(type(error).__name__, error)\n"
        "nothing = (0, 0, 0)\n"
        "call = lambda **changes: _C.two_segment(**{**dict(kernel='sm80', form='nt', out=nothing,\n"
        "    p=nothing, b=nothing, x=nothing, w=nothing, bias=0, sizes=(5, 7, 3, 2), dtype='bfloat16',\n"
        "    bias_dtype='float32', scale=1.0, dropout=(0, 9, 1.0), slab_steps=1, block_n=128, cluster=1, sums=nothing,\n"
        "    device=0, stream=0), **changes})\n"
        "for changes in ({}, dict(kernel='sm90'), dict(form='tt')):\n"
        "    try: call(**changes)\n"
        "    except (RuntimeError, ValueError) as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", use],
        cwd=module.parent,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},  # the launch fails on a GPU machine as well
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    built, launch, sm90, counter, code, residual, table, torn, product, kernel, form = (
        done.stdout.splitlines()
    )
    assert built.startswith("['80'] ['80'] ")
    shapes = (
        "merge: 1 layers, bfloat16 weight, float32 factors, rounding='nearest', device 0, "
        "(out, in, r) = (5, 7, 3): "
    )
    assert launch.startswith(f"RuntimeError {shapes}cudaError")
    assert sm90.startswith(f"RuntimeError {shapes}cudaError")
    assert counter == f"ValueError {shapes}expected a table in device memory, got none"
    assert code.startswith("ValueError merge: rounding: expected ") and code.endswith("got up")
    assert residual.endswith("rounding='compensated': expected a residual, got none")
    assert table.endswith(
        "(5, 7, 3) (5, 7, 3) (5, 7, 3) ...: expected a table in device memory, got none"
    )
    assert torn.startswith("ValueError merge: expected layers of ") and torn.endswith("got 9")
    shapes = "two_segment: sm80 nt, m = 5, n = 7, k = 3, r = 2, bfloat16, dropout of 9 / 65536, "
    assert product.startswith(
        f"RuntimeError {shapes}tile of 128, cluster of 1, device 0: cudaError"
    )
    assert (
        kernel == "ValueError two_segment: kernel: expected sm80, got sm90"
    )  # built for sm_80 alone
    assert form == "ValueError two_segment: form: expected nn, nt, tn, got tt"


def test_the_backend_says_why_it_has_no_kernels(monkeypatch, tmp_path):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    def broken(name):
        raise ImportError("_C.so: undefined symbol: cudaLaunchKernelExC")

    package = tmp_path / "relora_kernels"
    (package / "cuda").mkdir(parents=True)
    monkeypatch.setattr(cuda, "__file__", str(package / "cuda" / "__init__.py"))
    monkeypatch.setattr(cuda.importlib, "import_module", missing)
    assert "not built: no build was run; reinstall" in cuda.extension.__wrapped__()[1]
    (tmp_path / "csrc").mkdir()
    assert f"not built in {tmp_path}, which holds the sources" in cuda.extension.__wrapped__()[1]
    (package / "_C.missing.txt").write_text("no nvcc found\n")
    assert "not built: no nvcc found; reinstall" in cuda.extension.__wrapped__()[1]
    monkeypatch.setattr(cuda.importlib, "import_module", broken)
    assert "does not load: _C.so: undefined symbol" in cuda.extension.__wrapped__()[1]


@pytest.mark.parametrize(
    "capability, archs, ptx, serves",
    [
        ((8, 0), ["80"], [], True),
        ((8, 9), ["80"], [], True),  # a later minor version of the same major
        ((8, 0), ["86"], [], False),
        ((9, 0), ["80"], [], False),
        ((9, 0), ["80"], ["80"], True),
        ((8, 0), ["90"], ["90"], False),
        ((9, 0), ["90a"], [], True),
        ((10, 3), ["100"], [], True),
        ((10, 3), ["100a"], [], False),
        ((12, 0), ["100"], [], False),
    ],
)
def test_which_gpus_a_binary_serves(capability, archs, ptx, serves):
    reason = cuda.why_no_arch(capability, archs, ptx)
    assert (reason is None) == serves
    if reason:
        assert re.search(
            r"built for sm_\d+a?, and this GPU is sm_\d+; .*RELORA_KERNELS_ARCHS", reason
        )
