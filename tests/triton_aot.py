"""Compile every Triton kernel for every target without a GPU: `python tests/triton_aot.py`.

Prints one JSON object per kernel configuration and target: registers, stack (spills) and shared
memory in bytes, tensor-core instructions and global accesses found in the machine code. Run as a
program, since under TRITON_INTERPRET=1 (as the tests set it) kernels are not compiled.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TARGETS = (80, 90, 100, 120)
POINTERS = {"bf16": "*i16", "fp16": "*i16", "fp32": "*fp32"}


def merge_variants():
    """(kernel, name, pointer types, constants) of the merge as its launcher starts it."""
    from relora_kernels._triton import merge

    for weight, factor, rounding in (
        ("bf16", "fp32", "nearest"),
        ("bf16", "fp32", "stochastic"),
        ("bf16", "fp32", "compensated"),
        ("bf16", "bf16", "nearest"),
        ("fp16", "fp16", "stochastic"),
        ("fp32", "fp32", "nearest"),
    ):
        pointers = {"w_ptr": weight, "residual_ptr": weight, "a_ptr": factor, "b_ptr": factor}
        constants = {
            "W_DTYPE": weight, "FACTOR_DTYPE": factor, "ROUNDING": rounding,
            "HAS_RESIDUAL": rounding == "compensated",
            "PRECISION": merge.PRECISION[factor], **merge.CONFIG,
        }  # fmt: skip
        yield merge.merge_kernel, f"merge {weight} {factor} {rounding}", pointers, constants


def compiled(kernel, pointers: dict, constants: dict, arch: int):
    """As the launcher would specialise it: unit column strides, everything else divisible by 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    options = {k: constants[k] for k in ("num_warps", "num_stages")} | {"enable_fp_fusion": False}
    names = kernel.arg_names
    constants = {k: v for k, v in constants.items() if k in names}
    constants |= {n: 1 for n in names if n.endswith("_stride1")}
    other = {"scaling": "fp32", "seed": "i64"}
    signature = {
        n: "constexpr" if n in constants
        else POINTERS[pointers[n]] if n in pointers
        else other.get(n, "i32")
        for n in names
    }  # fmt: skip
    divisible = [i for i, n in enumerate(names) if n not in constants and n not in other]
    source = ASTSource(
        fn=kernel, signature=signature, constexprs={(names.index(k),): v for k, v in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
    )  # fmt: skip
    return compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def inspect(cubin: bytes) -> dict:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run(
                [tool, flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "registers": int(registers),
        "stack": int(stack),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "tensor_core": sorted(set(re.findall(r"\b([A-Z]*MMA\.[\w.]*|[A-Z]+HMMA)\b", sass))),
        "global": sorted(set(re.findall(r"\b((?:LDG|STG)\.[\w.]*)", sass))),
    }


def main() -> None:
    for arch in TARGETS:
        for kernel, name, pointers, constants in merge_variants():
            binary = compiled(kernel, pointers, constants, arch)
            row = {"kernel": name, "arch": arch, "shared": binary.metadata.shared}
            print(json.dumps(row | inspect(binary.asm["cubin"])), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
