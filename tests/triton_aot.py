"""Compile every Triton kernel for every target without a GPU.

    python tests/triton_aot.py [--table] [80 90 ...]

Prints, for each kernel configuration and target, registers, stack and spills, shared memory in bytes,
tensor-core instructions and global accesses as found in the machine code: one JSON object per line, or with
--table the contents of docs/triton_kernels.md. It is a separate program because under TRITON_INTERPRET=1,
which the tests set, kernels are not compiled.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import sass

from relora_kernels._triton import (
    lora_linear,
    lora_linear_mask,
    lora_linear_tma,
    magnitude_counts,
    merge,
    prune,
    prune_random,
)

TARGETS = (80, 90, 100, 120)
SHARED = {80: 166912, 90: 232448, 100: 232448, 120: 101376}  # bytes a block may use
MERGE_POINTERS = {"bf16": "*i16", "fp16": "*i16", "fp32": "*fp32"}


def variants(arch: int):
    """(kernel, name, argument types, constants and options) as the launchers start them."""
    for weight, factor, rounding in (
        ("bf16", "fp32", "nearest"),
        ("bf16", "fp32", "stochastic"),
        ("bf16", "fp32", "compensated"),
        ("bf16", "bf16", "nearest"),
        ("fp16", "fp16", "stochastic"),
        ("fp32", "fp32", "nearest"),
    ):
        w, f = MERGE_POINTERS[weight], MERGE_POINTERS[factor]
        types = {
            "w_ptr": w,
            "residual_ptr": w,
            "a_ptr": f,
            "b_ptr": f,
            "scaling": "fp32",
            "seed": "i64",
        }
        constants = {
            "W_DTYPE": weight, "FACTOR_DTYPE": factor, "ROUNDING": rounding,
            "HAS_RESIDUAL": rounding == "compensated", "PRECISION": merge.PRECISION[factor],
            **{f"{m}_stride1": 1 for m in ("w", "a", "b", "res")},
            "enable_fp_fusion": False, **merge.CONFIG,
        }  # fmt: skip
        yield merge.merge_kernel, f"merge {weight} {factor} {rounding}", types, constants

    for dtype in ("bf16", "fp32"):
        yield from linear_variants(arch, dtype)

    for name, bits in (("bf16", "*i16"), ("fp32", "*i32"), ("odd bf16", "*i16")):
        types = {"out_ptr": bits, "x_ptr": bits, "seed_ptr": "*i64"}
        constants = {"x_stride1": 1, **lora_linear_mask.MASK}
        yield lora_linear_mask.mask_kernel, f"mask {name}", types, constants


def linear_variants(arch: int, dtype: str):
    """Every tile of lora_linear's tables."""
    size, tail = {"bf16": (2, ""), "fp32": (4, " fp32")}[dtype]
    names = "x_ptr a_ptr p_ptr out_ptr b_ptr w_ptr bias_ptr left_ptr right_ptr".split()
    types = dict.fromkeys(names, f"*{dtype}") | {"seed_ptr": "*i64"}
    types |= {"scaling": "fp32", "keep_scale": "fp32", "partial_ptr": "*fp32"}
    common = {"PRECISION": "tf32" if dtype == "bf16" else "ieee"}

    big = lora_linear.TWO_SEGMENT[size].items()
    big = next(config for least, config in big if SHARED[arch] >= least)
    dropout, few = lora_linear.TWO_SEGMENT_DROPOUT[size], lora_linear.TWO_SEGMENT_FEW_ROWS[size]
    for name, forward, config in (
        ("y", True, big),
        ("dx", False, big),
        ("dx dropout", False, dropout),
        ("y few rows", True, few),
        ("dx few rows", False, few),
        ("dx few rows dropout", False, few),
        ("y odd", True, big),
        ("dx odd", False, big),
        ("dx dropout odd", False, dropout),
        ("y few rows odd", True, few),
    ):
        if name.endswith("odd"):
            config = config | lora_linear.TWO_SEGMENT_ODD[size]
        constants = {
            "W_IS_N_BY_K": forward, "HAS_BIAS": forward, "DROPOUT": "dropout" in name,
            "GROUP_M": lora_linear.GROUP_M, **common, **config,
        }  # fmt: skip
        yield lora_linear.two_segment_kernel, f"two_segment {name}{tail}", types, constants
        if arch >= 90 and dtype == "bf16":
            m, n, k = (config[f"BLOCK_{axis}"] for axis in "MNK")
            left, right = [m, k], [n, k] if forward else [k, n]
            tiles = {n: f"tensordesc<{dtype}{t}>" for n, t in zip("pbxw", (left, right) * 2)}
            kernel = lora_linear_tma.two_segment_tma_kernel
            yield kernel, f"two_segment_tma {name}{tail}", types | tiles, constants

    for name, forward in (("P", True), ("Q", False), ("P dropout", True)):
        for r in (16, 32, 64, lora_linear.LOW_RANK_MOST_R):
            constants = {"A_IS_R_BY_K": forward, "DROPOUT": "dropout" in name, "BLOCK_R": r}
            constants |= common | lora_linear.LOW_RANK[size]
            yield lora_linear.low_rank_kernel, f"low_rank {name} r={r}{tail}", types, constants

    for name in ("dB dbias", "dA dropout"):
        constants = {"HAS_BIAS": "dbias" in name, "DROPOUT": "dropout" in name}
        constants |= common | lora_linear.SPLIT[size]
        sums = types | {"bias_ptr": "*fp32"}
        yield lora_linear.split_kernel, f"split {name}{tail}", sums, constants
    constants = {"num_stages": 3, **lora_linear.REDUCE}
    yield lora_linear.reduce_kernel, f"reduce{tail}", types | {"scale": "fp32"}, constants


def prune_variants():
    buffers = ("table", "state", "hist", "list", "counts", "lowest", "highest")
    types = {f"{n}_ptr": "*i64" for n in buffers} | {"weight_ptr": "*fp32", "threshold": "i64"}
    sweep, select = ({"num_stages": 3, **config} for config in (prune.SWEEP, prune.SELECT))
    for dtype, digits in (("fp32", prune.DIGITS[4]), ("bf16", prune.DIGITS[2])):
        bits, kind = digits[-1], {"DTYPE": dtype}
        first, later = (
            {"FIRST": True, "BITS": 11, "SHIFT": sum(digits[1:])},
            {"FIRST": False, "BITS": bits},
        )
        pair = {"PAIRED": True, "PARTNER_DTYPE": dtype}
        for name, kernel, constants in (
            ("count first", prune.count_kernel, first | sweep),
            ("count last", prune.count_kernel, later | {"SHIFT": 0} | sweep),
            ("select last", prune.select_kernel, later | {"LAST": True} | select),
            ("partition", prune.partition_kernel, pair | {"SHIFT": first["SHIFT"]} | sweep),
            ("finish", prune.finish_kernel, pair | sweep),
            ("random", prune_random.random_kernel, pair | sweep),
            ("digits", magnitude_counts.counts_kernel, first | {"BINS": 2048} | sweep),
        ):
            constants = {
                k: v for k, v in (constants | kind).items() if k in kernel.arg_names or k.islower()
            }
            yield kernel, f"prune {name} {dtype}", types, constants


def compiled(kernel, types: dict, constants: dict, arch: int, odd: bool = False):
    """Compiles for pointers, sizes and pitches that are all divisible by 16, as the launchers find them in
    models; `odd`: only the pointers are."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    options = {k: v for k, v in constants.items() if k not in names}
    constants = {k: v for k, v in constants.items() if k in names}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    divisible = [
        i for i, n in enumerate(names)
        if n not in (*constants, "scaling", "scale", "keep_scale", "seed", "threshold")
        and not types.get(n, "").startswith("tensordesc")
        and (not odd or types.get(n, "").startswith("*"))
    ]  # fmt: skip
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(k),): v for k, v in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
    )
    return compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def inspect(cubin: bytes, code: str, tools: Path) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "registers": int(registers),
        "stack": int(stack),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "tensor_core": sorted(set(re.findall(r"\b([A-Z]*MMA\.[\w.]*|[A-Z]+HMMA)\b", code))),
        "tma": sorted(set(re.findall(r"\b(UTMA\w+)", code))),
        "fma": times(code, "FFMA"),
        "adds": times(code, "FADD"),
        "global": sorted(set(re.findall(r"\b((?:LDG|STG|LDGSTS)\.[\w.]*)", code))),
    }


def times(code: str, operation: str) -> int:
    """How often the code has a float32 operation; sm_100 and newer also have two in one instruction."""
    return len(re.findall(rf"\b{operation}\b", code)) + 2 * len(
        re.findall(rf"\b{operation}2\b", code)
    )


def rows(archs):
    tools = sass.find_tools()
    for arch in archs:
        kernels = [
            (name, compiled(kernel, types, constants, arch, " odd" in name))
            for kernel, name, types, constants in (*variants(arch), *prune_variants())
        ]
        cubins = [binary.asm["cubin"] for _, binary in kernels]
        codes = [b"".join(sass.functions(cubin).values()) for cubin in cubins]
        suffix = "a" if arch >= 90 else ""
        for (name, binary), cubin, code in zip(
            kernels, cubins, sass.disassembled(codes, f"{arch}{suffix}", tools)
        ):
            row = {"kernel": name, "arch": arch, "shared": binary.metadata.shared}
            yield row | {"most_shared": SHARED[arch]} | inspect(cubin, code, tools)


def print_table(found) -> None:
    import triton

    print("# What the compiler makes of the Triton kernels\n")
    print(
        f"Triton {triton.__version__}, by `python tests/triton_aot.py --table`; no GPU is needed."
    )
    print(
        "Sizes and pitches divisible by 16, but in the rows called odd. Global accesses: bits of the"
    )
    print("widest load and store.\n")
    print("| kernel | sm | registers | spills | shared, bytes | tensor cores | load | store |")
    print("|---|---|---|---|---|---|---|---|")
    for row in found:
        widths = [
            max((int(w) for op in row["global"] if op.startswith(kind) for w in [op.rpartition(".")[2]]
                 if w.isdecimal()), default=32)
            for kind in ("LDG", "STG")
        ]  # fmt: skip
        if row["tma"]:
            widths[0] = "TMA"
        units = ", ".join(row["tensor_core"]) or "-"
        cells = (
            row["kernel"],
            row["arch"],
            row["registers"],
            row["spills"],
            row["shared"],
            units,
            *widths,
        )
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    options = [a for a in sys.argv[1:] if a != "--table"]
    found = rows(map(int, options or TARGETS))
    if "--table" in sys.argv:
        return print_table(found)
    for row in found:
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
