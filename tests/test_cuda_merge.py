"""merge.cu on a GPU, through relora_kernels' own functions: graphs, streams, devices, whole models."""

import pytest
import test_cuda_source
import torch
from torch import nn

from relora_kernels import ReLoRaConfig, apply_relora, cuda, merge_and_reinit, use_backend
from relora_kernels.cuda import merge as launcher
from relora_kernels.model import relora_layers
from relora_kernels.ops import checks

REASON = "needs a GPU"
if torch.cuda.is_available():
    REASON = cuda.why_no_device(torch.device("cuda", 0))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def operands(n, k, r, dtype, factor_dtype=torch.float32, device="cuda"):
    """W and factors. The factors' products are exact in tf32 and in scaled fp16, the sums in float32."""
    lora_A = torch.randint(-8, 9, (r, k), device=device) / 2**6
    lora_B = torch.randint(-8, 9, (n, r), device=device) / 2**6
    weight = torch.randn(n, k, device=device).to(dtype)
    return weight, lora_A.to(factor_dtype), lora_B.to(factor_dtype)


def both(*args, rounding="nearest", seed=3):
    """W and residual by the reference and by the kernel."""
    found = []
    for backend in ("reference", "cuda"):
        weight = args[0].clone()
        residual = torch.zeros_like(weight) if rounding == "compensated" else None
        call = (weight, *args[1:], 0.5, rounding, residual, seed, 0)
        (launcher if backend == "cuda" else test_cuda_source.reference).merge_(*call)
        found.append([weight] + ([] if residual is None else [residual]))
    return found


@pytest.mark.parametrize("rounding", checks.ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", launcher.KERNELS)
@pytest.mark.parametrize(
    "shape",
    [
        (2048, 2048, 128),
        (4096, 4096, 100),
        (5461, 2048, 128),
        (2048, 5461, 128),
        (1030, 5460, 64),
        (1030, 2046, 128),
        (700, 1000, 512),
        (33, 129, 1),
    ],
)
def test_bitwise_as_the_reference_at_models_sizes(monkeypatch, shape, kernel, dtype, rounding):
    monkeypatch.setattr(launcher, "KERNEL", kernel)
    for theirs, ours in zip(*both(*operands(*shape, dtype), rounding=rounding)):
        test_cuda_source.assert_same_bits(ours, theirs)


@pytest.mark.parametrize("kernel", launcher.KERNELS)
@pytest.mark.parametrize("r", [4, 36, 128])
def test_float32_factors_keep_tf32s_precision(monkeypatch, kernel, r):
    monkeypatch.setattr(launcher, "KERNEL", kernel)
    test_cuda_source.keeps_tf32s_precision(r, (1030, 2056), "cuda")


@pytest.mark.parametrize("number", range(0, 27, 2))
@pytest.mark.parametrize("layers", [3, 18, 170])
def test_lists_are_bitwise_as_the_reference(number, layers):
    test_cuda_source.merges_as_the_reference(number, layers, "cuda")


def test_a_captured_list_merges_at_every_replay():
    lists = [[operands(70, 200, 9, torch.bfloat16) for _ in range(20)] for _ in "ab"]
    for theirs, ours in zip(*lists):
        for a, b in zip(theirs, ours):
            a.copy_(b)
    merges = [(*layer, 0.5, "stochastic", None, i, 0) for i, layer in enumerate(lists[0])]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launcher.merge_many_(merges)
    for (weight, *_), (before, *_) in zip(*lists):
        assert torch.equal(weight, before)  # capturing runs nothing
    for _ in range(3):
        graph.replay()
        again = [(*layer, 0.5, "stochastic", None, i, 0) for i, layer in enumerate(lists[1])]
        test_cuda_source.reference.merge_many_(again)
    for (weight, *_), (expected, *_) in zip(*lists):
        assert torch.equal(weight, expected)


def test_the_current_stream_is_used():
    """On a side stream that computes B first: a merge on another stream would read the old B."""
    weight, lora_A, lora_B = operands(512, 512, 16, torch.bfloat16)
    expected = both(weight, lora_A, lora_B)[0][0]
    late = torch.zeros_like(lora_B)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10**8)
        late.copy_(lora_B)
        launcher.merge_(weight, lora_A, late, 0.5, "nearest", None, 3, 0)
    torch.cuda.synchronize()
    assert torch.equal(weight, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    given = operands(64, 72, 5, torch.bfloat16, device="cuda:1")
    theirs, ours = both(*given)
    assert torch.equal(ours[0], theirs[0]) and torch.cuda.current_device() == 0


def test_a_whole_model_merges_in_one_launch(monkeypatch):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(40))).cuda()
        apply_relora(
            model, ReLoRaConfig(r=8, target_modules="all-linear", weight_dtype=torch.bfloat16)
        )
        for _, layer in relora_layers(model):
            layer.lora_A.data = torch.randint(-8, 9, layer.lora_A.shape, device="cuda") / 2**8
            layer.lora_B.data = torch.randint(-8, 9, layer.lora_B.shape, device="cuda") / 2**8
        return model

    models = [build(), build()]
    calls = []
    original = launcher._launch
    monkeypatch.setattr(launcher, "_launch", lambda *a: calls.append(a) or original(*a))
    for model, backend in zip(models, ("reference", "cuda")):
        with use_backend(backend):
            merge_and_reinit(model)
    assert len(calls) == 1
    for (_, a), (_, b) in zip(*map(relora_layers, models)):
        for (key, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items()):
            assert torch.equal(x, y), key
