"""Compile every Triton kernel for every target without a GPU.

    python tests/triton_aot.py [--table] [80 90 ...]

Prints, for each kernel configuration and target, registers, stack and spills, shared memory in bytes,
tensor-core instructions and global accesses as found in the machine code: a JSON object a line, or with
--table the contents of docs/triton_kernels.md. A program, since under TRITON_INTERPRET=1 (as the tests
set it) kernels are not compiled.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from relora_kernels._triton import lora_linear, lora_linear_tma, merge, prune

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

    def typed(dtype, **other):
        names = "x_ptr a_ptr p_ptr out_ptr b_ptr w_ptr bias_ptr left_ptr right_ptr".split()
        return dict.fromkeys(names, f"*{dtype}") | {"seed_ptr": "*i64"} | other

    big = next(c for least, c in lora_linear.TWO_SEGMENT.items() if SHARED[arch] >= least)
    for dropout in (False, True):
        tail = " dropout" if dropout else ""
        common = {"DROPOUT": dropout, "PRECISION": "tf32"}
        types = typed("bf16", scaling="fp32", keep_scale="fp32")
        for forward in (True, False):
            if not (forward and dropout):
                yield (
                    lora_linear.two_segment_kernel,
                    f"two_segment {'y' if forward else 'dx'}{tail}",
                    types,
                    {
                        "W_IS_N_BY_K": forward,
                        "HAS_BIAS": forward,
                        "GROUP_M": 8,
                        **common,
                        **(lora_linear.TWO_SEGMENT_DROPOUT if dropout else big),
                    },
                )
            if forward or not dropout:
                yield (
                    lora_linear.low_rank_kernel,
                    f"low_rank {'P' if forward else 'Q'}{tail}",
                    types,
                    {"A_IS_R_BY_K": forward, "BLOCK_R": 128, **common, **lora_linear.LOW_RANK},
                )
        yield (
            lora_linear.split_kernel,
            f"split {'dA' if dropout else 'dB dbias'}{tail}",
            typed("bf16", partial_ptr="*fp32", bias_ptr="*fp32"),
            {"HAS_BIAS": not dropout, **common, **lora_linear.SPLIT},
        )
    yield (
        lora_linear.two_segment_kernel, "two_segment y few rows", typed("bf16", keep_scale="fp32"),
        {"W_IS_N_BY_K": True, "HAS_BIAS": False, "DROPOUT": False, "PRECISION": "tf32", "GROUP_M": 8,
         **lora_linear.TWO_SEGMENT_FEW_ROWS},
    )  # fmt: skip
    yield (
        lora_linear.reduce_kernel, "reduce", {"partial_ptr": "*fp32", "out_ptr": "*fp32", "scale": "fp32"},
        {"num_stages": 3, **lora_linear.REDUCE},
    )  # fmt: skip


def tma_variants(arch: int):
    """From Hopper on. The second operand's block is turned where W is given as (K, N)."""
    for name, forward, config in (
        ("y", True, lora_linear.TWO_SEGMENT[160_000]),
        ("dx", False, lora_linear.TWO_SEGMENT[160_000]),
        ("dx dropout", False, lora_linear.TWO_SEGMENT_DROPOUT),
        ("y few rows", True, lora_linear.TWO_SEGMENT_FEW_ROWS),
    ):
        if config is lora_linear.TWO_SEGMENT[160_000] and SHARED[arch] < 160_000:
            config = lora_linear.TWO_SEGMENT[0]
        m, n, k = (config[f"BLOCK_{axis}"] for axis in "MNK")
        left, right = f"[{m}, {k}]", f"[{n}, {k}]" if forward else f"[{k}, {n}]"
        types = dict.fromkeys(("out_ptr", "bias_ptr"), "*bf16") | dict(
            seed_ptr="*i64", keep_scale="fp32"
        )
        types |= {
            n: f"tensordesc<bf16{block}>" for n, block in zip("pbxw", (left, right, left, right))
        }
        constants = {"W_IS_N_BY_K": forward, "HAS_BIAS": forward, "DROPOUT": "dropout" in name,
                     "PRECISION": "tf32", "GROUP_M": lora_linear.GROUP_M, **config}  # fmt: skip
        yield lora_linear_tma.two_segment_tma_kernel, f"two_segment_tma {name}", types, constants


def prune_variants():
    types = {f"{n}_ptr": "*i64" for n in ("table", "state", "hist", "list")} | {
        "weight_ptr": "*fp32"
    }
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
        ):
            yield kernel, f"prune {name} {dtype}", types, constants | kind


def compiled(kernel, types: dict, constants: dict, arch: int):
    """With every pointer, size and pitch divisible by 16, as the launchers find them in models."""
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
    ]  # fmt: skip
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(k),): v for k, v in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
    )
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
        "tma": sorted(set(re.findall(r"\b(UTMA\w+)", sass))),
        "global": sorted(set(re.findall(r"\b((?:LDG|STG|LDGSTS)\.[\w.]*)", sass))),
    }


def rows(archs):
    for arch in archs:
        tma = tma_variants(arch) if arch >= 90 else ()
        for kernel, name, types, constants in (*variants(arch), *tma, *prune_variants()):
            binary = compiled(kernel, types, constants, arch)
            row = {"kernel": name, "arch": arch, "shared": binary.metadata.shared}
            yield row | {"most_shared": SHARED[arch]} | inspect(binary.asm["cubin"])


def print_table(found) -> None:
    import triton

    print("# What the compiler makes of the Triton kernels\n")
    print(
        f"Triton {triton.__version__}, by `python tests/triton_aot.py --table`; no GPU is needed. Sizes"
    )
    print("and pitches divisible by 16. Global accesses: bits of the widest load and store.\n")
    print("| kernel | sm | registers | spills | shared, bytes | tensor cores | load | store |")
    print("|---|---|---|---|---|---|---|---|")
    for row in found:
        widths = [
            max((int(w) for op in row["global"] if op.startswith(kind) for w in [op.rpartition(".")[2]]
                 if w.isdecimal()), default=32)
            for kind in ("LDG", "STG")
        ]  # fmt: skip
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
