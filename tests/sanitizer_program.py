"""Every CUDA kernel once, on small operands, compared with the reference: for compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 python tests/sanitizer_program.py [PART ...]

Without the variable, torch's tensors lie side by side in one allocation, and a write beyond a tensor may stay
inside that. Operands are drawn and the reference runs on the CPU, because the sanitizer has to instrument
every kernel it meets, torch's too. Exit status: 0 all equal, 1 not, 2 nothing can be run here.
"""

import itertools
import sys
import time

import torch
from oracle import check_against_fp64, operands

from relora_kernels import FusedReLoRaLinear, cuda, lora_linear, merge_, prune_, use_backend
from relora_kernels.cuda import merge
from relora_kernels.layer import merge_layers
from relora_kernels.ops.checks import ROUNDINGS
from relora_kernels.ops.prune import prune_random_

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def exact_factors(n, k, r, dtype, device):
    """lora_A, lora_B whose products are exact in tf32 and whose sums are exact in float32."""
    shapes = (r, k), (n, r)
    return [(torch.randint(-8, 9, shape) / 2**6).to(dtype).to(device) for shape in shapes]


def merges(device):
    """Whole matrices, odd ones, and columns of a wider one: odd pitches, rows that start anywhere."""
    shapes, found = [(1, 1, 1), (33, 129, 1), (70, 133, 9), (128, 264, 24)], []
    for dtype, rounding, (n, k, r) in itertools.product(DTYPES, ROUNDINGS, shapes):
        for extra, factor_dtype in ((0, torch.float32), (3, dtype)):
            weight = torch.randn(n, k + extra).to(dtype).to(device)
            residual = None
            if rounding == "compensated" and dtype != torch.float32:
                residual = torch.zeros_like(weight)[:, extra // 2 :][:, :k]
            weight = weight[:, extra // 2 :][:, :k]
            factors = exact_factors(n, k, r, factor_dtype, device)
            merge_(weight, *factors, 0.5, rounding, residual, seed=3)
            found += [weight] if residual is None else [weight, residual]
    return found


def streamed_merges(device):
    """The same with the kernel for every GPU, on sm_90 too."""
    before, merge.KERNEL = merge.KERNEL, "streamed"
    try:
        return merges(device)
    finally:
        merge.KERNEL = before


def many_tiles(device):
    """Over three times as many as 132 multiprocessors hold, so that a block goes through several, or strips."""
    found = []
    for rounding, factor_dtype in (
        ("nearest", torch.float32), ("compensated", torch.bfloat16), ("stochastic", torch.float32)
    ):  # fmt: skip
        weight = torch.randn(3712, 3720).bfloat16().to(device)
        residual = torch.zeros_like(weight) if rounding == "compensated" else None
        factors = exact_factors(3712, 3720, 8, factor_dtype, device)
        merge_(weight, *factors, 0.5, rounding, residual, seed=3)
        found += [weight] if residual is None else [weight, residual]
    return found


def lists(device):
    """A model's layers in one launch, more than its arguments hold, each restarted after its merge."""
    found = []
    for dtype, rounding in itertools.product(DTYPES, ROUNDINGS):
        layers = []
        for i in range(20):
            n, k, r = 17 + 13 * (i % 5), 24 + 9 * (i % 3), 1 + i % 7
            layer = FusedReLoRaLinear(k, n, r=r, dtype=dtype, merge_rounding=rounding, name=str(i))
            layer.lora_A.data, layer.lora_B.data = exact_factors(n, k, r, torch.float32, "cpu")
            layers.append(layer.to(device))
        merge_layers(layers)
        found += [value for layer in layers for value in layer.state_dict().values()]
    return found


def moments(device, dtype):
    """Tensors for one block and for many, some with ties, and one that is not contiguous."""
    tensors = [torch.randn(size) for size in (1, 2, 77, 5003, 70_000, 300_001, 450_003)]
    tensors += [torch.randint(-3, 4, (size,)) for size in (900, 40_000)]
    tensors = [t.to(dtype).to(device) for t in (*tensors, torch.randn(60, 70))]
    return [*tensors[:-1], tensors[-1].T[1:, ::2]]


def prunes(device):
    found = []
    for dtype, ratio in itertools.product(DTYPES, (0.0, 0.9, 0.999, 1.0)):
        alone = moments(device, dtype)
        prune_(alone, ratio)
        found += alone
        for partner_dtype in (torch.bfloat16, torch.float32):  # the latter uses Hopper's clusters
            tensors = moments(device, dtype)
            partners = [torch.ones_like(t, dtype=partner_dtype) for t in tensors]
            prune_(tensors, ratio, partners)
            found += [*tensors, *partners]
    return found


def windows(device):
    """Tensors that are sampled first: one whose window holds, and one with two very different magnitudes."""
    tensors = []
    for dtype in (torch.float32, torch.bfloat16):
        t = torch.randn(2**24 + 5)
        tensors += [t.to(dtype), torch.where(t > 1.2816, 1e9 * t, t).to(dtype)]
    tensors = [t.to(device) for t in tensors]
    partners = [torch.ones_like(t) for t in tensors]
    prune_(tensors, 0.9, partners)
    return [*tensors, *partners]


def random_prunes(device):
    found = []
    for dtype, ratio in itertools.product(DTYPES, (0.0, 0.5, 1.0)):
        tensors = moments(device, dtype)
        partners = [torch.ones_like(t, dtype=torch.float32) for t in tensors]
        prune_random_(tensors, ratio, partners, range(len(tensors)), [5] * len(tensors))
        found += [*tensors, *partners]
    return found


def counts(device):
    found = []
    for dtype in DTYPES:
        tensors = [t.contiguous() for t in moments(device, dtype)]
        for shift, bits in ((18, 13), (8, 10)):
            prefixes = torch.full((len(tensors),), 0x3FA00000 >> (shift + bits), device=device)
            found += torch.ops.relora_kernels._magnitude_counts(tensors, prefixes, shift, bits)
    return found


def linear(device):
    """Forward and backward, compared with fp64, because the reference rounds its sums at other places."""

    def there(x, weight, lora_A, lora_B, scaling, bias):
        x, weight, lora_A, lora_B, bias = (t.to(device) for t in (x, weight, lora_A, lora_B, bias))
        return lora_linear(x, weight, lora_A, lora_B, scaling, bias).cpu()

    for sizes in ((96, 136, 104, 24), (40, 65, 33, 3)):
        check_against_fp64(operands(*sizes, torch.bfloat16, torch.float32), ours=there)
    return []


PARTS = (merges, streamed_merges, many_tiles, lists, prunes, windows, random_prunes, counts, linear)


def run(part, backend: str, device: str) -> None:
    """Runs `part` on `backend`; raises AssertionError unless each tensor equals the reference's bit for bit."""
    found = []
    for name, place in ((backend, device), ("reference", "cpu")):
        torch.manual_seed(0)
        with use_backend(name):
            found.append([t.cpu() for t in part(place)])
    for i, (ours, theirs) in enumerate(zip(*found, strict=True)):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), (
            f"{part.__name__}: tensor {i}, {tuple(ours.shape)} {ours.dtype}, is not the reference's"
        )


def main() -> int:
    reason = "expected a CUDA GPU that torch can use, got none"
    if torch.cuda.is_available():
        reason = cuda.why_no_device(torch.device("cuda", 0))
    if reason is not None:
        print(f"sanitizer_program: {reason}", file=sys.stderr)
        return 2
    names = [part.__name__ for part in PARTS]
    wanted = sys.argv[1:] or names
    if not set(wanted) <= set(names):
        print(f"sanitizer_program: expected parts of {names}, got {wanted}", file=sys.stderr)
        return 2
    for part in (part for part in PARTS if part.__name__ in wanted):
        start = time.monotonic()
        run(part, "cuda", "cuda:0")
        torch.cuda.synchronize()
        print(f"{part.__name__}: ok in {time.monotonic() - start:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
