"""What nvcc makes of csrc/*.cu, read from the compiled module relora_kernels._C; no GPU is needed.

    python tests/cuda_table.py [--table]

Prints, for each kernel and architecture, registers, local memory (spills), shared memory, tensor-core
instructions and global accesses as found in the machine code, and its digest: one JSON object per line, or
with --table the contents of docs/cuda_kernels.md. Dynamic shared memory is not included. The installed module
is used if it was built from these sources, with this nvcc, for all architectures; otherwise one is built.
"""

import concurrent.futures
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import sass

CSRC = Path(__file__).resolve().parent.parent / "csrc"
sys.path.insert(0, str(CSRC))
import cuda_build  # noqa: E402

# By default no build compiles all sources for these: they are assembled here from the module's PTX.
FROM_PTX = ("86", "89")
KINDS = ("LDG", "LDGSTS", "STG")  # load, copy to shared memory, store
ARCHS = (*sorted({*cuda_build.DEFAULT_ARCHS, *FROM_PTX}, key=int), "90a")


def find_tools(nvcc: Path) -> Path | None:
    """The toolkit's tools, or Triton's, because PyPI's nvcc comes without them."""
    return sass.find_tools(cuda_build.toolkit_root(nvcc) / "bin", nvcc.parent)


def demangled(names: list[str]) -> list[str]:
    """`merge_kernel<bf16, float>` and the like; unchanged if there is no c++filt."""
    tool = shutil.which("c++filt")
    if tool is None:
        return names
    done = subprocess.run([tool, *names], capture_output=True, text=True, check=True)
    plain = re.sub(r"(void|relora::|\(anonymous namespace\)::)\s*", "", done.stdout)
    # Drops the arguments: the parentheses that close the line.
    return [re.sub(r"\([^()]*\)$", "", line.strip()) for line in plain.splitlines()]


def compiled_module(nvcc: Path, work: Path) -> Path:
    """The installed module if it is what a build would make, else one built in the folder `work`."""
    from relora_kernels.cuda import extension

    module, _ = extension()
    if module is not None:
        is_same = module.sources == cuda_build.sources_digest()
        is_same &= module.nvcc_version == cuda_build.nvcc_version(nvcc)
        if is_same and set(module.archs) == set(cuda_build.DEFAULT_ARCHS):
            return Path(module.__file__)
    return cuda_build.compile_module(nvcc, work)


def kernels(tools: Path, cubin: Path) -> list[dict]:
    """A row for each kernel of a cubin of one architecture, with the name that `cuobjdump -xelf` gives it."""
    arch = cubin.name.split(".")[-2].removeprefix("sm_")
    usage = re.findall(
        r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
        cuda_build.run(tools / "cuobjdump", "-res-usage", cubin),
    )
    functions = sass.functions(cubin.read_bytes())
    code = dict(zip(functions, sass.disassembled(list(functions.values()), arch, tools)))
    assert usage and {name for name, *_ in usage} == set(code), cubin.name
    rows = []
    for (mangled, registers, stack, shared, local), name in zip(
        usage, demangled([name for name, *_ in usage])
    ):
        body = code[mangled]
        rows.append(
            {
                "kernel": name,
                "arch": arch,
                "code": hashlib.sha256(functions[mangled]).hexdigest(),
                "registers": int(registers),
                "spills": int(stack) + int(local),
                "shared": int(shared),
                "tensor_core": sorted(set(re.findall(r"\b([HIQ]G?MMA\.\d[\w.]*)", body))),
                # Whether it lets the next launch start early, and whether it waits for the one before.
                "overlaps": ("PREEXIT" in body, "ACQBULK" in body),
                # {instruction: how often}
                "global": dict(
                    sorted(Counter(re.findall(rf"\b((?:{'|'.join(KINDS)})\.[\w.]*)", body)).items())
                ),
            }
        )
    return rows


def assemble(nvcc: Path, tools: Path, module: Path, folder: Path) -> None:
    """The module's PTX for FROM_PTX, named much as `cuobjdump -xelf` would name it."""
    ptxas = cuda_build.toolkit_root(nvcc) / "bin" / "ptxas"
    subprocess.run(
        [tools / "cuobjdump", "-xptx", "all", module], cwd=folder, check=True, capture_output=True
    )
    jobs = [
        (path, arch)
        for path in folder.glob("*.ptx")
        for arch in FROM_PTX
        if int(path.name.split(".")[-2].removeprefix("sm_")) <= int(arch)
    ]
    assert jobs, f"{module} has no PTX"
    jobs.sort(key=lambda job: -job[0].stat().st_size)

    def one(job):
        path, arch = job
        cubin = path.with_name(f"{path.stem}.sm_{arch}.cubin")
        cuda_build.run(ptxas, f"-arch=sm_{arch}", path, "-o", cubin)

    with concurrent.futures.ThreadPoolExecutor(cuda_build.jobs()) as pool:
        list(pool.map(one, jobs))


def all_kernels() -> list[dict]:
    nvcc = cuda_build.find_nvcc()
    tools = find_tools(nvcc)
    with tempfile.TemporaryDirectory() as folder:
        module = compiled_module(nvcc, Path(folder))
        subprocess.run(
            [tools / "cuobjdump", "-xelf", "all", module],
            cwd=folder, check=True, capture_output=True,
        )  # fmt: skip
        assemble(nvcc, tools, module, Path(folder))
        cubins = [path for arch in ARCHS for path in Path(folder).glob(f"*.sm_{arch}.cubin")]
        cubins.sort(key=lambda path: -path.stat().st_size)  # so that the workers end together
        with concurrent.futures.ThreadPoolExecutor(cuda_build.jobs()) as pool:
            found = list(pool.map(lambda cubin: kernels(tools, cubin), cubins))
    rows = {(row["kernel"], row["arch"]): row for each in found for row in each}
    return sorted(rows.values(), key=lambda row: (int(row["arch"].rstrip("af")), row["kernel"]))


def accesses(row: dict, kind: str) -> dict[int, int]:
    """{bits: how many} of a kernel's global accesses of one of KINDS, the widest first."""
    found = Counter()
    for name, times in row["global"].items():
        if name.startswith(f"{kind}."):
            bits = re.search(r"\.[US]?(8|16|64|128)\b", name)
            found[int(bits[1]) if bits else 32] += times
    return dict(sorted(found.items(), reverse=True))


def print_table(rows) -> None:
    nvcc = cuda_build.nvcc_version(cuda_build.find_nvcc())
    print(
        f"# What nvcc makes of the CUDA kernels\n\n"
        f"nvcc {nvcc}, by `python tests/cuda_table.py --table`; no GPU is needed. Rows of sm_86 and sm_89 are\n"
        f"assembled from sm_80's PTX; by default these GPUs run sm_80's code for merge and prune, and sm_89\n"
        f"sm_86's for the products. Spills: bytes of local memory. Shared: bytes of static shared memory, in\n"
        f"kernels that use any from sm_90 on with the 1024 that are the system's; the launchers ask for the\n"
        f"dynamic part.\n"
        f"Load, copy, store: bits of the widest global access and how many of them the code has, copy being\n"
        f"straight to shared memory; tails and unaligned tensors take narrower ones besides. TMA, by which\n"
        f"sm_90a's kernels move their tiles, is not counted. They have 229 440 or 229 472 bytes of dynamic\n"
        f"shared memory, sm_90's merge 220 944, sm_80's products 65 536. Form 0, 1, 2: nt, nn, tn of\n"
        f"csrc/launch.h; behind it whether there is dropout, and whether it is Q and dB in one launch. Rounding\n"
        f"0, 1, 2: nearest, stochastic, compensated. held_kernel below sm_90 is empty: it needs clusters.\n"
    )
    print("| kernel | sm | registers | spills | shared | tensor cores | load | copy | store |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row[key] for key in ("kernel", "arch", "registers", "spills", "shared")]
        cells.append(", ".join(row["tensor_core"]) or "-")
        for kind in KINDS:
            widest = next(iter(accesses(row, kind).items()), None)
            cells.append(f"{widest[0]} x {widest[1]}" if widest else "-")
        print("| " + " | ".join(map(str, cells)) + " |")


def main() -> None:
    rows = all_kernels()
    if "--table" in sys.argv:
        return print_table(rows)
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
