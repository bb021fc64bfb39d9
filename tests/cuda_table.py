"""What nvcc makes of csrc/*.cu, without a GPU.

    python tests/cuda_table.py [--table] [80 90 ...]

Prints, for each kernel and architecture, registers, spills, shared memory, tensor-core instructions and
global accesses as found in the machine code: a JSON object a line, or with --table the contents of
docs/cuda_kernels.md. Dynamic shared memory is not in it.
"""

import concurrent.futures
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
sys.path.insert(0, str(CSRC))
import cuda_build  # noqa: E402


def find_cuobjdump(nvcc: Path) -> Path | None:
    """The toolkit's; PyPI's nvcc comes without one, and then Triton's."""
    triton = importlib.util.find_spec("triton")
    candidates = [cuda_build.toolkit_root(nvcc) / "bin", nvcc.parent]
    candidates += [Path(shutil.which("cuobjdump")).parent] if shutil.which("cuobjdump") else []
    if triton is not None and triton.origin is not None:
        candidates.append(Path(triton.origin).parent / "backends/nvidia/bin")
    found = (folder / "cuobjdump" for folder in candidates)
    return next((tool for tool in found if os.access(tool, os.X_OK)), None)


def demangled(names: list[str]) -> list[str]:
    """`merge_kernel<bf16, float>` and the like; as they are where there is no c++filt."""
    tool = shutil.which("c++filt")
    if tool is None:
        return names
    done = subprocess.run([tool, *names], capture_output=True, text=True, check=True)
    plain = re.sub(r"(void|relora::|\(anonymous namespace\)::)\s*", "", done.stdout)
    # Without the arguments: the parenthesis that closes the line.
    return [re.sub(r"\([^()]*\)$", "", line.strip()) for line in plain.splitlines()]


def kernels(source: Path, arch: str) -> list[dict]:
    """A row for each kernel of `source`."""
    nvcc = cuda_build.find_nvcc()
    # As the build does it.
    base = (
        cuda_build.virtual_arch(cuda_build.source_archs(source, cuda_build.DEFAULT_ARCHS)) or arch
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        report = cuda_build.run(
            nvcc, *cuda_build.COMPILE_FLAGS, "-Xptxas=-v", "-cubin", source, "-o", cubin,
            f"-gencode=arch=compute_{base},code=sm_{arch}",
        )  # fmt: skip
        sass = cuda_build.run(find_cuobjdump(nvcc), "-sass", cubin)
    code = dict(re.findall(r"Function : (\w+)\n(.*?)(?=\n\s*Function : |\Z)", sass, re.S))
    usage = re.findall(
        r"Compiling entry function '(\w+)' for.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers(?:.*?(\d+) bytes smem)?",
        re.sub(r"\n(?!ptxas info    : Compiling)", " ", report),
    )
    assert {name for name, *_ in usage} == set(code), report
    rows = []
    for (mangled, stack, stores, loads, registers, shared), name in zip(
        usage, demangled([name for name, *_ in usage])
    ):
        body = code[mangled]
        rows.append(
            {
                "kernel": name,
                "arch": arch,
                "registers": int(registers),
                "spills": int(stack) + int(stores) + int(loads),
                "shared": int(shared or 0),
                "tensor_core": sorted(set(re.findall(r"\b([HIQ]G?MMA\.\d[\w.]*)", body))),
                "global": sorted(set(re.findall(r"\b((?:LDG|STG|LDGSTS)\.[\w.]*)", body))),
            }
        )
    return sorted(rows, key=lambda row: row["kernel"])


def all_kernels(archs) -> list[dict]:
    work = [
        (source, arch)
        for source in sorted(CSRC.glob("*.cu"))
        for arch in cuda_build.source_archs(source, list(archs))
    ]
    # The longest first, so that the workers end together.
    work.sort(key=lambda item: -item[0].stat().st_size)
    with concurrent.futures.ThreadPoolExecutor(cuda_build.jobs()) as pool:
        found = list(pool.map(lambda item: kernels(*item), work))
    rows = [row for each in found for row in each]
    return sorted(rows, key=lambda row: (int(row["arch"].rstrip("af")), row["kernel"]))


def widest(row: dict, kind: str) -> int:
    """Bits of the widest global access that begins with `kind`; 0 for none."""
    accesses = [name for name in row["global"] if name.startswith(kind)]
    widths = [int(w) for name in accesses for w in re.findall(r"\.(64|128)\b", name)]
    return max(widths, default=32 if accesses else 0)


def print_table(rows) -> None:
    nvcc = cuda_build.nvcc_version(cuda_build.find_nvcc())
    print("# What nvcc makes of the CUDA kernels\n")
    print(
        f"nvcc {nvcc}, by `python tests/cuda_table.py --table`; no GPU is needed. Spills: bytes of"
    )
    print(
        "local memory. Shared: bytes of static shared memory; the launchers ask for the dynamic part."
    )
    print(
        "Load, copy, store: bits of the widest global access, copy being straight to shared memory; TMA,"
    )
    print(
        "by which sm_90a's kernels move their tiles, is not counted. They have 229 440 or 229 472 bytes of"
    )
    print(
        "dynamic shared memory, sm_80's products 65 536. Form 0, 1, 2: nt, nn, tn of csrc/launch.h; behind it\n"
        "whether there is dropout, and whether it is Q and dB in one launch.\n"
    )
    print("| kernel | sm | registers | spills | shared | tensor cores | load | copy | store |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row[key] for key in ("kernel", "arch", "registers", "spills", "shared")]
        cells.append(", ".join(row["tensor_core"]) or "-")
        cells += [widest(row, kind) or "-" for kind in ("LDG.", "LDGSTS.", "STG.")]
        print("| " + " | ".join(map(str, cells)) + " |")


def main() -> None:
    archs = [a for a in sys.argv[1:] if a != "--table"] or list(cuda_build.DEFAULT_ARCHS)
    rows = all_kernels(archs)
    if "--table" in sys.argv:
        return print_table(rows)
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
