"""Cases of lora_linear's CUDA kernels on a GPU, each reported as it ends: its name, a tab, "ok" or what is
wrong. test_cuda_gemm_gpu.py runs this in a process of its own, because a kernel may hang.

    python tests/gemm_program.py [name ...]
"""

import itertools
import sys

import torch
from oracle import assert_as_good_as, check_against_fp64, operands

from relora_kernels import lora_linear, use_backend
from relora_kernels.cuda import lora_linear as launcher
from relora_kernels.reference import lora_linear as reference

DEVICE = "cuda"  # the tests of this program say "cpu"
VARIANTS = {"sm80": [(128, 1)], "sm90": [(128, 1), (256, 1), (256, 2)]}
SHAPES = [  # m, n, k, r
    (1, 1, 1, 1),
    (7, 520, 136, 3),
    (64, 4096, 4096, 128),
    (129, 257, 65, 33),
    (300, 264, 1000, 100),
    (1000, 2048, 5464, 128),
    (4096, 1376, 512, 512),
]


def drawn(rows, cols, dtype):
    """A random matrix whose pitch is a multiple of 16 bytes, with NaN beside the values."""
    pitch = -(-cols // 8) * 8 + 8
    matrix = torch.full((rows, pitch), torch.nan, dtype=dtype, device=DEVICE)[:, :cols]
    return matrix.copy_(torch.randn(rows, cols, device=DEVICE) * cols**-0.5)


def force(kernel, variant):
    launcher._kernel = lambda device: kernel
    launcher._variant = lambda *_: {"block_n": variant[0], "cluster": variant[1]}


def product(kernel, variant, form, shape, dtype, p=0.0):
    """One launch, compared with fp64; three runs agree bit for bit."""
    force(kernel, variant)
    m, n, k, r = shape
    x, low = drawn(m, k, dtype), drawn(m, r, dtype)
    w, b = (drawn(*((n, d) if form == "nt" else (d, n)), dtype) for d in (k, r))
    bias = torch.randn(n, device=DEVICE)
    dropout = launcher._dropout(p, torch.tensor(7, device=DEVICE))

    def formula(change):
        right, small = (change(t).T if form == "nt" else change(t) for t in (w, b))
        correction = change(low) @ small
        if p:
            correction = correction * reference.dropout_mask(correction, p, dropout[0])
        return change(x) @ right + correction + change(bias).to(change(x).dtype)

    results = [launcher._product(form, x, w, low, b, bias=bias, dropout=dropout) for _ in range(3)]
    exact, eager = formula(torch.Tensor.double), formula(lambda t: t)
    assert_as_good_as(results[0], eager, exact, 2, dtype)
    assert all(torch.equal(results[0], other) for other in results[1:])


def pair(cluster, shape, dtype):
    """Two products in one launch, compared with fp64; three runs agree bit for bit."""
    launcher.PAIR = cluster
    m, k, n = shape
    x, w, p = drawn(m, k, dtype), drawn(k, n, dtype), drawn(m, n, dtype)
    results = [launcher._pair(x, w, p, 0.5, dtype) for _ in range(3)]
    exact = 0.5 * (x.double() @ w.double()), x.double().T @ p.double()
    for got, eager, right in zip(results[0], (0.5 * (x @ w), x.T @ p), exact):
        assert_as_good_as(got, eager, right, 2, dtype)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def pair_layer(cluster, *sizes):
    launcher.PAIR = cluster
    layer(*sizes, torch.bfloat16, torch.float32)


def layer(rows, in_features, out_features, r, dtype, lora_dtype):
    with use_backend("cuda"):
        tensors = operands(
            rows, in_features, out_features, r, dtype, lora_dtype, DEVICE, r % 2 == 0
        )
        check_against_fp64(tensors)


def dropout_layer(p, sizes=(520, 264, 392, 24)):
    x, weight, lora_A, lora_B, bias = operands(*sizes, torch.bfloat16, device=DEVICE)
    dy, wanted = torch.randn(sizes[0], sizes[2], device=DEVICE).bfloat16(), (x, lora_A, lora_B)
    with use_backend("cuda"):
        y = lora_linear(x, weight, lora_A, lora_B, 0.5, bias, p, 11)
        got = [y.detach(), *torch.autograd.grad(y, wanted, dy)]
    with use_backend("reference"):
        y = lora_linear(x, weight, lora_A, lora_B, 0.5, bias, p, 11)
        usual = [y.detach(), *torch.autograd.grad(y, wanted, dy)]
        t = [v.detach().double().requires_grad_() for v in (x, weight, lora_A, lora_B, bias)]
        y = lora_linear(t[0], t[1].detach(), *t[2:4], 0.5, t[4], p, 11)
        exact = [y.detach(), *torch.autograd.grad(y, (t[0], *t[2:4]), dy.double())]
    for i, (a, b, c) in enumerate(zip(got, usual, exact)):
        assert_as_good_as(a, b, c, 2 if i == 0 else 3, torch.bfloat16)


def repeat():
    """Gradients come out bit for bit the same, on another stream as well."""
    x, weight, lora_A, lora_B, bias = operands(3000, 1024, 2736, 128, torch.bfloat16, device=DEVICE)
    dy = torch.randn(3000, 2736, device=DEVICE).bfloat16()
    results = []
    for _ in range(3):
        with use_backend("cuda"), torch.cuda.stream(torch.cuda.Stream()):
            y = lora_linear(x, weight, lora_A, lora_B, 0.25, bias)
            results.append([y, *torch.autograd.grad(y, (x, lora_A, lora_B, bias), dy)])
        torch.cuda.synchronize()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def cases() -> dict:
    """Name -> a call. The cheapest of every variant first."""
    found = {}
    bf16, fp16 = torch.bfloat16, torch.float16
    for (kernel, variants), shape in itertools.product(VARIANTS.items(), SHAPES):
        for variant, form in itertools.product(variants, ("nt", "nn")):
            dtype = fp16 if shape[0] % 2 else bf16
            name = f"{kernel} {variant[0]}x{variant[1]} {form} {'x'.join(map(str, shape))}"
            found[name] = (product, kernel, variant, form, shape, dtype)
    for kernel, variant in (("sm80", (128, 1)), ("sm90", (256, 1))):
        for p, shape in itertools.product((0.1, 1.0), SHAPES[1:5]):
            name = f"{kernel} dropout {p} {'x'.join(map(str, shape))}"
            found[name] = (product, kernel, variant, "nn", shape, bf16, p)
    for cluster, (m, n, k, r) in itertools.product((1, 2), [*SHAPES, (16384, 2048, 4096, 128)]):
        name, dtype = f"sm90 pair of {cluster}", fp16 if m % 2 else bf16
        found[f"{name} {m}x{k}x{r}"] = (pair, cluster, (m, k, r), dtype)
        found[f"{name} layer {m}x{k}x{n}x{r}"] = (pair_layer, cluster, m, k, n, r)
    for rows, i, o, r, lora_dtype in (
        (1, 8, 8, 1, bf16),
        (7, 4096, 4096, 128, torch.float32),
        (96, 136, 104, 100, torch.float32),
        (2048, 512, 1376, 128, torch.float32),
        (1024, 2048, 5461, 128, torch.float32),  # the paper's largest model
        (1024, 5461, 2048, 127, bf16),
        (16384, 768, 768, 512, torch.float32),
    ):
        found[f"layer {rows} {i} {o} {r}"] = (layer, rows, i, o, r, bf16, lora_dtype)
    found["layer fp16"] = (layer, 300, 520, 264, 24, fp16, torch.float32)
    found["dropout layer"] = (dropout_layer, 0.3)
    found["repeat"] = (repeat,)
    kernels = () if not torch.cuda.is_available() else launcher.extension()[0].two_segment_kernels
    capability = torch.cuda.get_device_capability() if kernels else (0, 0)
    usable = {"sm80": capability >= (8, 0), "sm90": capability == (9, 0)}
    return {
        name: call
        for name, call in found.items()
        if name[:4] not in usable or usable[name[:4]] and name[:4] in kernels
    }


def main(names) -> None:
    new_empty = torch.Tensor.new_empty

    def filled(self, *args, **kwargs):  # what a kernel does not write stays NaN and is found
        out = new_empty(self, *args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    torch.Tensor.new_empty = filled
    originals = launcher._kernel, launcher._variant, launcher.PAIR
    known = cases()
    for name in names or known:
        function, *arguments = known[name]
        launcher._kernel, launcher._variant, launcher.PAIR = originals
        torch.manual_seed(0)
        try:
            function(*arguments)
            torch.cuda.synchronize()
            verdict = "ok"
        except (AssertionError, RuntimeError) as error:
            verdict = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"{name}\t{verdict}", flush=True)
        if "CUDA error" in verdict or "cudaError" in verdict:
            return  # the context is lost: the rest must run in another process


if __name__ == "__main__":
    main(sys.argv[1:])
