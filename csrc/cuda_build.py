"""Builds `relora_kernels._C`, and is the PEP 517 build backend (setuptools' own, plus nvcc).

Environment variables:
    RELORA_KERNELS_CUDA   auto (default): build the kernels if nvcc is found; if there is only a
                          driver, fetch nvcc from PyPI; otherwise install without kernels and note why.
                          on: a build without kernels is an error. off: no kernels.
    RELORA_KERNELS_ARCHS  e.g. "80;90a", or "native" for this machine's GPUs
    MAX_JOBS              parallel compilations; default: all cores

nvcc is searched for in CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda and among the installed Python
packages. No torch is needed: the kernels take raw pointers and link CUDA's runtime statically.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

CSRC = Path(__file__).resolve().parent
TOOLKIT = Path("/usr/local/cuda")
DRIVER_FILE = Path("/proc/driver/nvidia/version")
# The metapackage pins the whole set: pinning nvcc alone pulls in a newer nvvm, and ptxas fails.
PYPI_NVCC = "cuda-toolkit[nvcc,cudart,cccl,crt,nvvm]==13.0.*"
OLDEST_DRIVER = 580  # for CUDA 13
# No sm_89: it runs sm_86's machine code, which is what ptxas makes for it, too (tests/test_cuda_compile.py).
DEFAULT_ARCHS = ("80", "86", "90", "100", "120")
# The oldest architecture that the sources compile for, and the oldest one that has each suffix.
OLDEST = 80
OLDEST_WITH = {"": OLDEST, "a": 90, "f": 100}
# -Og is for host code, which runs once per launch: bindings.cpp takes a fifth longer to compile with -O1
# and twice as long with -O3. Device code is fully optimised regardless.
COMPILE_FLAGS = ["-std=c++17", "-Xcompiler", "-Og,-fPIC,-fvisibility=hidden,-Wall"]
FATBIN_FLAGS = ["-Xfatbin=-compress-all"]  # 2 MB of machine code and PTX instead of 9
# Longest compilations first, so that two parallel jobs end together. The other files take seconds.
LONGEST = (
    "prune.cu", "merge_streamed.cu", "merge_sm90.cu", "two_segment_sm90.cu", "two_segment_sm80.cu",
    "bindings.cpp",
)  # fmt: skip


class BuildError(SystemExit):
    """Ends the build with a message instead of a traceback."""


class KnobError(BuildError):
    """An environment variable has an invalid value: an error in every mode."""


# ---- Decisions ----------------------------------------------------------------------------------


def mode() -> str:
    value = os.environ.get("RELORA_KERNELS_CUDA") or "auto"
    if value not in ("auto", "on", "off"):
        raise KnobError(f"RELORA_KERNELS_CUDA: expected auto, on or off, got {value!r}")
    return value


def jobs() -> int:
    value = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not value.isdecimal() or int(value) < 1:
        raise KnobError(f"MAX_JOBS: expected a number of jobs >= 1, got {value!r}")
    return int(value)


def find_nvcc() -> Path | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    candidates = [Path(home, "bin", "nvcc") for home in homes]
    candidates += [Path(on_path)] if on_path else []
    candidates += [TOOLKIT / "bin" / "nvcc"]
    candidates += [Path(entry, "nvidia", "cu13", "bin", "nvcc") for entry in sys.path]
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def driver_version() -> int | None:
    """Major version of the NVIDIA driver on this machine."""
    if not DRIVER_FILE.exists():
        return None
    found = re.search(r"\s(\d+)\.\d+", DRIVER_FILE.read_text())
    return int(found[1]) if found else None


def why_no_fetch() -> str | None:
    """Why `auto` does not fetch a missing nvcc from PyPI on this machine; None if it does."""
    driver = driver_version()
    if driver is None:
        return "no nvcc found, and no NVIDIA driver to build kernels for"
    if driver < OLDEST_DRIVER:
        return f"no nvcc found, and PyPI's needs an NVIDIA driver >= {OLDEST_DRIVER}, got {driver}"
    return None


def build_requirements() -> list[str]:
    """What the build needs in addition to setuptools."""
    if mode() == "off":
        return []
    tools = ["ninja", "pybind11"]
    if find_nvcc():
        return tools
    reason = why_no_fetch()
    if mode() == "on" or reason is None:
        return [*tools, PYPI_NVCC]
    print(f"relora_kernels: building without CUDA kernels: {reason}", flush=True)
    return []


# ---- nvcc ---------------------------------------------------------------------------------------


def run(*command) -> str:
    """Output of a command. If it fails, raises BuildError with the last lines of it."""
    try:
        done = subprocess.run(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-40:])
        raise BuildError(f"{shlex.join(map(str, command))} exited {done.returncode}:\n{tail}")
    return done.stdout


def toolkit_root(nvcc: Path) -> Path:
    """The toolkit's folder, as nvcc itself reports it: `nvcc` may be a wrapper script elsewhere."""
    here = re.search(r"_HERE_=(.+)", run(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull))
    if not here:
        raise BuildError(f"{nvcc} --dryrun: expected a line with _HERE_=, got none")
    return Path(here[1].strip()).parent


def native_archs() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        lines = run(*command).split()
    except BuildError as error:
        raise KnobError(f"RELORA_KERNELS_ARCHS=native: no GPU to ask: {error}") from error
    found = sorted({line.replace(".", "") for line in lines}, key=int)
    old = [name for name in found if int(name) < OLDEST]
    if old == found:
        raise KnobError(
            f"RELORA_KERNELS_ARCHS=native: expected a GPU of sm_{OLDEST} or newer, got {', '.join(old)}"
        )
    return found[len(old) :]


def archs(nvcc: Path) -> list[str]:
    """GPU architectures to build for, e.g. ["80", "90a"]."""
    known = re.findall(r"compute_(\d+)\b", run(nvcc, "--list-gpu-arch"))
    known = [name for name in known if int(name) >= OLDEST]
    wanted = os.environ.get("RELORA_KERNELS_ARCHS")
    if not wanted:
        return [arch for arch in DEFAULT_ARCHS if arch in known]
    names = native_archs() if wanted == "native" else wanted.split(";")
    for name in names:
        number, suffix = re.fullmatch(r"(\d*)(.*)", name, re.DOTALL).groups()
        if number not in known or int(number) < OLDEST_WITH.get(suffix, 10**9):
            raise KnobError(
                f'RELORA_KERNELS_ARCHS: expected "native" or a list like "80;90a" out of '
                f"{', '.join(known)} ({nvcc}), with an a from 90 or an f from 100 on, got {name!r} in "
                f"{wanted!r}"
            )
    return names


# Sources that use newer features from an architecture on (overlapping launches), with PTX of their own.
NEWER = {"prune.cu": 90}


def virtual_arch(names: list[str]) -> str | None:
    """The lowest architecture without a suffix. All plain architectures are assembled from its PTX: apart
    from NEWER, the sources use nothing newer, and most of the compile time goes into producing PTX. The
    PTX is embedded as well, for GPUs of other architectures. None if every name has a suffix: PTX for an
    architecture with a suffix ("90a") runs on that architecture alone."""
    return min((name for name in names if name.isdecimal()), key=int, default=None)


def arch_flags(names: list[str], newer: int | None = None) -> list[str]:
    """`newer`: the architecture from which on the source uses newer features, with PTX of its own."""
    if newer is not None:
        older = [name for name in names if int(name.rstrip("af")) < newer]
        return arch_flags(older) + arch_flags([name for name in names if name not in older])
    lowest = virtual_arch(names)
    own = [name for name in names if lowest is None or int(name.rstrip("af")) < int(lowest)]
    codes = [f"arch=compute_{name},code=sm_{name}" for name in own]
    if lowest is not None:
        shared = [f"sm_{name}" for name in names if name not in own]
        codes.append(f"arch=compute_{lowest},code=[{','.join(shared)},compute_{lowest}]")
    return [f"-gencode={code}" for code in codes]


def source_archs(source: Path, names: list[str]) -> list[str]:
    """The architectures that a file is compiled for; if there are none, the file is left out.

    *_sm90.cu uses instructions of sm_90a alone, *_sm80.cu those of sm_80 and newer. The other files are
    memory-bound: ptxas makes nearly the same code for sm_86 as for sm_80, and sm_80's runs on sm_86."""
    if source.stem.endswith("_sm90"):
        return ["90a"] if {"90", "90a"} & set(names) else []
    if source.stem.endswith("_sm80"):
        return [name for name in names if int(name.rstrip("af")) >= 80]
    return [name for name in names if name != "86" or "80" not in names]


# ---- The build ----------------------------------------------------------------------------------


def nvcc_version(nvcc: Path) -> str:
    release = re.search(r"\bV(\d+\.\d+\.\d+)", run(nvcc, "--version"))
    if not release:
        raise BuildError(f"{nvcc} --version: expected a line with V<release>, got none")
    return release[1]


def sources_digest() -> str:
    """Digest of the kernels' sources: measurements of other sources say nothing about these."""
    digest = hashlib.sha256()
    for path in sorted(p for p in CSRC.iterdir() if p.suffix in (".cu", ".cuh", ".h")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def write_ninja(nvcc: Path, names: list[str], work: Path, module: Path) -> None:
    import pybind11

    def command(*words) -> str:  # quoted for the shell; $in and $out are ninja's
        return shlex.join(map(str, words)).replace("$", "$$") + " "

    def path(p: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(p))

    ptx = virtual_arch(names)
    info = {"ARCHS": names, "PTX": [ptx] if ptx else [], "NVCC_VERSION": [nvcc_version(nvcc)]}
    info["SOURCES"] = [sources_digest()]
    text = "".join(
        f"#define RELORA_{name} " + ", ".join(f'"{value}"' for value in values) + "\n"
        for name, values in info.items()
    )
    for stem in ("_sm80", "_sm90"):
        wanted = source_archs(Path(stem), names)
        text += f"#define RELORA{stem.upper()} {int(bool(wanted))}\n"
    header = work / "build_info.h"
    if not header.exists() or header.read_text() != text:
        header.write_text(text)

    includes = [f"-I{p}" for p in (work, pybind11.get_include(), sysconfig.get_path("include"))]
    depend = " -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n"
    library = toolkit_root(nvcc) / "lib"  # PyPI's nvcc does not look there by itself
    sources = sorted([*CSRC.glob("*.cu"), *CSRC.glob("*.cpp")])
    sources.sort(key=lambda p: LONGEST.index(p.name) if p.name in LONGEST else len(LONGEST))
    # Two nvcc threads that share a core take a third longer than the same work one after the other.
    threads = max(1, min(jobs() // len(sources), len(names)))
    compile_ = command(nvcc, *COMPILE_FLAGS)
    rules = "rule cuda\n  command = " + compile_
    rules += command(f"--threads={threads}", *FATBIN_FLAGS) + "$archs " + depend
    rules += "rule cxx\n  command = " + compile_ + command(*includes) + depend
    rules += "rule link\n  command = " + command(nvcc, "-shared", "-cudart=static", f"-L{library}")
    rules += "$in -o $out\n"
    objects = []
    for source in sources:
        wanted = source_archs(source, names)
        if not wanted:
            continue
        objects.append(path(work / f"{source.name}.o"))
        rule = "cuda" if source.suffix == ".cu" else "cxx"
        rules += f"build {objects[-1]}: {rule} {path(source)}\n"
        if rule == "cuda":
            rules += f"  archs = {command(*arch_flags(wanted, NEWER.get(source.name)))}\n"
    rules += f"build {path(module)}: link {' '.join(objects)}\n"
    (work / "build.ninja").write_text(rules)


def compile_module(nvcc: Path, work: Path) -> Path:
    """Compile csrc/ in the folder `work`; returns a module that has been imported once."""
    names = archs(nvcc)
    work = work.resolve() / nvcc_version(nvcc)  # never reuse another nvcc's objects
    work.mkdir(parents=True, exist_ok=True)
    module = work / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    try:
        import ninja  # noqa: F401, as `python -m ninja`

        write_ninja(nvcc, names, work, module)
        run(sys.executable, "-m", "ninja", "-C", work, "-j", jobs())
    except ImportError as error:
        raise BuildError(f"{error}; pip install ninja pybind11, or use build isolation") from error
    load = "import sys; sys.path.insert(0, sys.argv[1]); import _C; print(_C.archs)"
    run(sys.executable, "-c", load, work)
    return module


def build_into(package: Path, work: Path) -> Path:
    """Put `_C` into the package, or `_C.missing.txt` with the reason; returns that file.

    If this build ends with an error, the result of an earlier build stays in the package.
    """
    wanted, nvcc = mode(), find_nvcc()
    jobs()
    if wanted == "off":
        reason = "RELORA_KERNELS_CUDA=off when relora_kernels was installed"
    elif nvcc is None:
        reason = why_no_fetch() or f"no nvcc found: install a CUDA toolkit, or '{PYPI_NVCC}'"
    else:
        try:
            return put_into(package, compile_module(nvcc, work))
        except KnobError:
            raise
        except BuildError as error:
            reason = f"the build with {nvcc} failed: {error}"
    if wanted == "on":
        raise BuildError(f"RELORA_KERNELS_CUDA=on: {reason}")
    print(f"relora_kernels: no CUDA kernels: {reason}", flush=True)
    work.mkdir(parents=True, exist_ok=True)
    note = work / "_C.missing.txt"
    note.write_text(reason + "\n")
    return put_into(package, note)


def put_into(package: Path, file: Path) -> Path:
    """Replace the file atomically, because other processes may be importing it; then delete stale builds."""
    package.mkdir(parents=True, exist_ok=True)
    target = package / file.name
    temporary = package / f".{file.name}.new"
    try:
        shutil.copy2(file, temporary)
        temporary.replace(target)
    except BaseException:  # e.g. a full disk
        temporary.unlink(missing_ok=True)
        raise
    for stale in package.glob("_C.*"):  # from another build, maybe with other settings
        if stale != target:
            stale.unlink()
    return target


# ---- PEP 517 and 660 hooks: setuptools' own, except for these ------------------------------------


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return build_requirements()


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return build_requirements()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None) -> str:
    from setuptools import build_meta

    for left_over in Path("build").glob("lib*"):  # setuptools would ship its contents
        shutil.rmtree(left_over)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def __getattr__(name: str):
    from setuptools import build_meta

    return getattr(build_meta, name)
