"""Cases that a layer and a model have to survive: a clear error or the right answer, nothing lost.

There are fifty such cases. Their numbers in the names of tests, here and elsewhere, are only labels: each
test's name says what its case is. A `fault` with a number, in other files, is a known fault of earlier ReLoRA
code that the test would catch.

The ops' own tests take the cases of this file at the level of one call: 1-8, 10, 11, 13, 16-20 in
test_lora_linear, 7 in test_backend, 12 in test_merge, 14 in test_triton. The model's refusals (36 tied weights,
44 no target, 45 wrapped already, 50 pending gradients) are in test_model too. Cases of environment and training
(21-35, 38-43, 46-49) are with the tests of what they concern.
"""

import copy

import pytest
import torch
from oracle import assert_as_good_as, error
from torch import nn

from relora_kernels import (
    FusedReLoRaLinear,
    ReLoRaConfig,
    ReLoRaSchedule,
    apply_relora,
    backend,
    lora_parameters,
    merge_and_reinit,
    merge_and_unload,
    use_backend,
)
from relora_kernels.model import relora_layers

TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def layer_of(in_features=8, out_features=6, r=2, **kwargs):
    layer = FusedReLoRaLinear(in_features, out_features, r=r, lora_alpha=r, **kwargs)
    with torch.no_grad():
        layer.lora_B.normal_(0, 0.3)
    return layer


def plain(layer, x):
    """What the layer computes, in plain PyTorch."""
    update = nn.functional.linear(nn.functional.linear(x, layer.lora_A), layer.lora_B)
    return nn.functional.linear(x, layer.weight, layer.bias) + layer.scaling * update


def step(layer, x):
    """y, dx, dA, dB and dbias for a gradient of ones that takes no memory (case 11)."""
    x = x.detach().requires_grad_()
    y = layer(x)
    gradients = torch.autograd.grad(y.sum(), (x, layer.lora_A, layer.lora_B, layer.bias))
    return y.detach(), *gradients


def test_case_1_wrong_in_features():
    with pytest.raises(ValueError, match=r"x \(\.\.\., in\) with in = 8.*got x \(4, 9\)"):
        layer_of()(torch.zeros(4, 9))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_case_2_zero_rows(shape):
    layer = layer_of()
    y, dx, *gradients = step(layer, torch.zeros(shape))
    assert y.shape == (*shape[:-1], 6) and dx.shape == shape
    assert all(g.shape == p.shape and not g.any()
               for g, p in zip(gradients, (layer.lora_A, layer.lora_B, layer.bias)))  # fmt: skip
    layer.merge()


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 5, 8), (2, 1, 5, 8)])
def test_case_3_any_number_of_dimensions(shape):
    layer, x = layer_of(), torch.randn(shape)
    torch.testing.assert_close(layer(x), plain(layer, x))


@pytest.mark.parametrize("r", [1, 3, 13, 24, 40])
def test_case_4_ranks_that_are_odd_or_above_the_layers(r):
    layer, x = layer_of(16, 12, r=r), torch.randn(5, 16)
    y, before = plain(layer, x), layer.weight.clone()
    torch.testing.assert_close(layer(x), y)
    layer.merge()
    torch.testing.assert_close(layer(x), y)
    assert not torch.equal(layer.weight, before) and layer.lora_A.shape == (r, 16)
    with pytest.raises(ValueError, match="r >= 1, got 0"):
        FusedReLoRaLinear(8, 8, r=0)


@pytest.mark.parametrize(
    ("dtypes", "says"),
    [
        ((torch.float32, torch.bfloat16, None), "x torch.float32 and weight torch.bfloat16.*autocast"),
        ((torch.float64, torch.float32, None), "x torch.float64 and weight torch.float32"),
        ((torch.float32, torch.float32, torch.float16), "lora_A and lora_B in float32.*float16"),
    ],
)  # fmt: skip
def test_case_5_mixed_dtypes(dtypes, says):
    x, weight, lora = dtypes
    with pytest.raises(TypeError, match=says):
        layer_of(dtype=weight, lora_dtype=lora)(torch.zeros(4, 8, dtype=x))
    masters = layer_of(dtype=torch.bfloat16)  # this mix is intended
    assert masters(torch.randn(4, 8).bfloat16()).dtype == torch.bfloat16
    masters.lora_A.data = masters.lora_A.data.bfloat16()
    with pytest.raises(TypeError, match="lora_A and lora_B of one dtype"):
        masters(torch.randn(4, 8).bfloat16())


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e5m2, torch.complex64])
def test_case_6_dtypes_that_are_no_floats(dtype):
    with pytest.raises(TypeError, match=f"got.*{str(dtype).removeprefix('torch.')}"):
        layer_of()(torch.zeros(4, 8).to(dtype))
    with pytest.raises(ValueError, match="dtype to be a floating"):
        FusedReLoRaLinear(8, 6, r=2, dtype=dtype)


def test_case_7_a_cpu_layer_and_a_gpu_backend():
    layer = layer_of()
    before = copy.deepcopy(layer.state_dict())
    with use_backend("cuda"):
        with pytest.raises(backend.BackendUnavailable, match="'cuda'"):
            layer(torch.zeros(4, 8))
        with pytest.raises(backend.BackendUnavailable, match="'cuda'"):
            layer.merge()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_case_8_tensors_on_several_devices():
    with pytest.raises(ValueError, match=r"one device.*x on meta, weight on cpu.*\.to\(\)"):
        layer_of()(torch.zeros(4, 8, device="meta"))


@TWO_GPUS
def test_case_8_tensors_on_several_gpus():
    with pytest.raises(ValueError, match="one device.*cuda:1"):
        layer_of(device="cuda:0")(torch.zeros(4, 8, device="cuda:1"))


@TWO_GPUS
def test_case_9_another_gpu_than_the_current_one():
    layer, x = layer_of(64, 48, r=8, device="cuda:1"), torch.randn(32, 64, device="cuda:1")
    torch.cuda.set_device(0)
    y = plain(layer, x)
    torch.testing.assert_close(layer(x), y, rtol=1e-3, atol=1e-3)
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-3, atol=1e-3)
    assert torch.cuda.current_device() == 0


def test_cases_10_11_12_strides_that_no_kernel_likes(device):
    """x and parameters transposed, with gaps, and starting at odd offsets; a gradient of stride 0."""

    def hostile(t):
        wide = torch.full((t.shape[1] * 2 + 3, t.shape[0] + 1), torch.nan, device=t.device)
        view = wide[3::2][: t.shape[1], 1:].T
        return view.copy_(t)

    layer, x = layer_of(24, 20, r=3, device=device), torch.randn(7, 24, device=device)
    expected = step(layer, x)
    for parameter in (layer.weight, layer.lora_A, layer.lora_B):
        parameter.data = hostile(parameter.data)
    for a, b in zip(step(layer, hostile(x)), expected):
        torch.testing.assert_close(a, b)
    y = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), y)


def test_case_13_odd_pitch_of_the_papers_largest_model(device):
    for shape in ((5461, 7), (7, 5461)):
        layer = layer_of(*shape, r=5, device=device)
        x = torch.randn(3, shape[0], device=device)
        exact = plain(copy.deepcopy(layer).double(), x.double())
        assert_as_good_as(layer(x), plain(layer, x), exact, 2, torch.float32)
        layer.merge()
        assert error(layer(x), exact) <= 1e-4 * exact.abs().max()


@pytest.mark.skipif(backend.triton_missing() is not None, reason="needs Triton")
def test_case_15_grids_stay_inside_their_limits(monkeypatch):
    """Every launch of the largest calls: 2^31 - 1 programs along x, 65535 along y and z."""
    from relora_kernels._triton import lora_linear, merge, prune

    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    for module in (lora_linear, merge, prune):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder())

    def tensor(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    for rows, width, r in ((2**24, 2**13, 512), (2**10, 2**21, 512), (2**30, 1, 1)):
        x, weight = tensor(rows, width), tensor(width, width)
        factors = tensor(r, width), tensor(width, r)
        _, p = lora_linear.forward(x, weight, *factors, 1.0, tensor(width), 0.0, None)
        lora_linear.backward(x, x, weight, *factors, p, 1.0, 0.0, None, *[True] * 4)
        merge.merge_(weight, *factors, 1.0, "nearest", None, 0, 0)
    moments = [tensor(2, 3) for _ in range(2000)] + [tensor(2**31, 2)]
    prune.prune_(moments, 0.9, [])
    assert len(grids) > 20
    for grid in grids:
        assert 1 <= grid[0] < 2**31 and all(1 <= size <= 65535 for size in grid[1:]), grid


@pytest.mark.parametrize("where", ["x", "weight", "bias", "lora_A", "lora_B"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_case_16_nan_and_inf_are_never_masked(where, value):
    layer, x = layer_of(), torch.randn(4, 8)
    target = x if where == "x" else getattr(layer, where).data
    target.view(-1)[3] = value
    y = layer(x)
    assert torch.equal(y.isfinite(), plain(layer, x).isfinite()) and not y.isfinite().all()


def test_case_17_double_backward():
    layer, x = layer_of(), torch.randn(4, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_case_18_a_merge_between_forward_and_backward():
    """The merge changes what backward needs: backward raises instead of returning wrong gradients."""
    layer, x = layer_of(), torch.randn(4, 8, requires_grad=True)
    y = layer(x)
    layer.merge()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_case_19_parameters_of_inference_mode():
    with torch.inference_mode():
        layer = layer_of()
        y = layer(torch.randn(4, 8))
        layer.merge()
    assert y.is_inference() and layer.merge_count == 1


def test_case_20_raw_dtensor_parameters(tmp_path):
    """A DTensor parameter that fully_shard does not manage is refused by name when it is used."""
    import torch.distributed as dist
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    layer = layer_of()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        layer.lora_B = nn.Parameter(distribute_tensor(layer.lora_B.detach(), mesh))
        with pytest.raises(TypeError, match="lora_B to be a plain tensor, got a DTensor"):
            layer(torch.zeros(4, 8))
    finally:
        dist.destroy_process_group()


def test_a_model_that_ddp_waits_for_is_refused(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        inner = nn.Sequential(nn.Linear(8, 8))
        model = nn.parallel.DistributedDataParallel(inner)
        with pytest.raises(ValueError, match="apply first, then wrap"):
            apply_relora(model, ReLoRaConfig(r=2, target_modules="all-linear"))
        assert type(inner[0]) is nn.Linear and inner[0].weight.requires_grad
    finally:
        dist.destroy_process_group()


def llama(**kwargs):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, **kwargs,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def randomise(model):
    with torch.no_grad():
        for _, layer in relora_layers(model):
            layer.lora_B.normal_(0, 0.1)
    return model


def test_case_36_tied_embeddings_stay_tied(tmp_path):
    model = randomise(apply_relora(llama(tie_word_embeddings=True), ReLoRaConfig(r=4)))
    ids = torch.arange(8)[None]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p is model.lm_head.weight for p in model.parameters()) == 1
    merge_and_reinit(model)
    merge_and_unload(randomise(model))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.eval().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="shared by model.embed_tokens.weight, lm_head.weight"):
        apply_relora(again, ReLoRaConfig(r=4, target_modules=["lm_head"]))


def test_case_37_parameters_that_are_not_contiguous_at_save(tmp_path):
    model = apply_relora(llama(), ReLoRaConfig(r=4, weight_dtype=torch.bfloat16))
    merge_and_reinit(randomise(model))
    randomise(model)
    for _, layer in relora_layers(model):
        for parameter in (layer.weight, layer.lora_A, layer.lora_B):
            parameter.data = parameter.data.T.contiguous().T
        layer.weight_residual = layer.weight_residual.T.contiguous().T
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    assert sum(k.endswith("weight_residual") for k in saved) == 14
    model.save_pretrained(tmp_path / "hf")
    torch.save(model.state_dict(), tmp_path / "states.pt")
    from safetensors.torch import load_file

    for state in (
        load_file(tmp_path / "hf" / "model.safetensors"),
        torch.load(tmp_path / "states.pt", weights_only=True),
    ):
        again = apply_relora(llama(), ReLoRaConfig(r=4, weight_dtype=torch.bfloat16))
        again.load_state_dict(state)
        assert again.state_dict().keys() == saved.keys()
        assert all(torch.equal(v, saved[k]) for k, v in again.state_dict().items())
    merge_and_unload(again)


@pytest.mark.parametrize("target", [["q_project"], r"layers\.\d+", ["model.layers.7.mlp.up_proj"]])
def test_case_44_no_target_lists_candidates(target):
    model = llama()
    with pytest.raises(ValueError, match="none of 15; candidates: model.layers.0.self_attn.q_proj"):
        apply_relora(model, ReLoRaConfig(target_modules=target))
    assert all(p.requires_grad for p in model.parameters())


def test_case_45_a_model_wrapped_already_is_left_alone():
    model = randomise(apply_relora(llama(), ReLoRaConfig(r=4)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="got 14 .*merge_and_unload"):
        apply_relora(model, ReLoRaConfig(r=8))
    assert model.relora_config.r == 4
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    apply_relora(merge_and_unload(model), ReLoRaConfig(r=8))  # as the message advises


def test_case_50_a_restart_with_gradients_pending_waits():
    """Nothing is merged, reset or counted; the same restart happens once they are gone."""
    model = apply_relora(llama(), ReLoRaConfig(r=4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = ReLoRaSchedule(model, optimizer, lambda step: 1.0, 2, 0)
    ids = torch.arange(8)[None]
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.lr_scheduler.step()
    model(ids, labels=ids).loss.backward()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    with pytest.raises(RuntimeError, match="pending gradients.*q_proj.lora_.*zero_grad"):
        schedule.restart_if_due()
    after = model.state_dict(), optimizer.state_dict()["state"]
    assert all(torch.equal(v, before[0][k]) for k, v in after[0].items())
    assert all(torch.equal(after[1][i][k], v) for i, s in before[1].items() for k, v in s.items())
    assert schedule.cycle == 0
    optimizer.zero_grad()
    assert schedule.restart_if_due() and schedule.cycle == 1
    assert all(layer.merge_count == 1 for _, layer in relora_layers(model))
    assert any(not p.any() for p in lora_parameters(model))
