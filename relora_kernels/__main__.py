"""python -m relora_kernels: what is built, what this machine has, which backend each op takes, by what
evidence. python -m relora_kernels tune: measure here, for `auto` to choose by (see --help)."""

from __future__ import annotations

import platform
import sys

import torch

import relora_kernels
from relora_kernels import backend, cuda, evidence, tune
from relora_kernels.ops import lora_linear, merge, prune


def main() -> int:
    if sys.argv[1:2] == ["tune"]:
        return tune.main(sys.argv[2:])
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if sys.argv[1:]:
        print(f"expected nothing or 'tune', got {' '.join(sys.argv[1:])}", file=sys.stderr)
        return 2
    describe()
    return 0


def describe() -> None:
    print(f"relora_kernels {relora_kernels.__version__} in {relora_kernels.__path__[0]}")
    print(f"  python    {platform.python_version()}")
    print(f"  torch     {torch.__version__} (CUDA {torch.version.cuda or 'none'})")
    print(f"  triton    {_triton()}")
    print(f"  kernels   {_kernels()}")
    devices = [torch.device("cpu")]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        print(f"  cuda:{i}    {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
        devices.append(torch.device("cuda", i))
    if len(devices) == 1:
        print("  GPU       none that torch can use")
    print(f"  backend   {_named_backend()} ({backend.ENVIRONMENT_VARIABLE}, use_backend)")
    for device in devices:
        print(f"\nwhat 'auto' takes for tensors on {device}:")
        for op, implementations, why_not, args in _calls(device):
            _print_choice(op, implementations, why_not, args)
        if device.type == "cuda":
            _print_evidence(evidence.identity(device))


def _print_evidence(here: dict[str, str]) -> None:
    """Print what was measured on this device. It takes precedence over the order printed above."""
    found = evidence.sources(here)
    if not found:
        print(f"  evidence: none on record for {evidence.section_name(here)}; so the order above")
        print("            holds at every shape until `python -m relora_kernels tune` is run")
    for source in found:
        if source.refused:
            print(f"  evidence: {source.kind} {source.path} is ignored: {source.refused}")
            continue
        print(f"  evidence: {source.kind} {source.path}, made {source.date}, goes first:")
        for entry in source.entries:
            its_class = ", ".join(map(str, entry["class"]))
            print(f"    {entry['op']:22} {its_class:40} {', '.join(entry['order'])}")


def _print_choice(op: str, implementations: dict, why_not: str, args) -> None:
    reasons = {
        name: backend.reason_against(name, op, implementations, why_not, args)
        for name in [*implementations, *(b for b in backend.BACKENDS if b not in implementations)]
    }
    on_record = [name for name in evidence.order(op, args) if reasons.get(name, "") is None]
    taken = [*on_record, *(name for name, reason in reasons.items() if reason is None)][0]
    print(f"  {op:24} {taken}")
    for name, reason in reasons.items():
        if name != taken:
            print(f"  {'':24} not {name}: {reason or f'{taken} comes first'}")


def _calls(device: torch.device):
    """A bfloat16 call of each op with float32 factors, as in training."""
    x, weight = (torch.empty(16, 16, dtype=torch.bfloat16, device=device) for _ in range(2))
    lora_A, lora_B = torch.empty(16, 16, device=device), torch.empty(16, 16, device=device)
    bias, residual = torch.empty(16, device=device), torch.empty_like(weight)
    factors = (weight, lora_A, lora_B)
    linear, pruning = lora_linear.IMPLEMENTATIONS, prune.IMPLEMENTATIONS
    yield "lora_linear", linear, "why_not_forward", (x, *factors, 1.0, bias, 0.0, None)
    yield (
        "lora_linear backward", linear, "why_not_backward",
        (x, x, *factors, x, 1.0, 0.0, None, True, True, True, True),
    )  # fmt: skip
    yield "merge_", merge.IMPLEMENTATIONS, "why_not", (*factors, 1.0, "compensated", residual, 0, 0)
    yield "prune_", pruning, "why_not", ([lora_A], 0.9, [lora_B])
    drawn = prune.RANDOM_IMPLEMENTATIONS
    yield "prune_random_", drawn, "why_not_random", ([lora_A], 0.9, [lora_B], [0], [0])
    prefixes = torch.zeros(1, dtype=torch.int64, device=device)
    yield (
        "magnitude_counts",
        prune.COUNTS_IMPLEMENTATIONS,
        "why_not_counts",
        ([lora_A], prefixes, 20, 11),
    )


def _named_backend() -> str:
    try:
        return backend.current_backend()
    except ValueError as error:  # this page exists to show such errors: report it, continue
        return f"none: {error}"


def _triton() -> str:
    if (missing := backend.triton_missing()) is not None:
        return missing
    import triton

    return triton.__version__


def _kernels() -> str:
    module, reason = cuda.extension()
    if module is None:
        return reason
    archs = ", ".join(f"sm_{a}" for a in module.archs)
    return f"CUDA C++ for {archs}, PTX {', '.join(module.ptx)}"


if __name__ == "__main__":
    sys.exit(main())
