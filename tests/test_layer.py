"""FusedReLoRaLinear as a drop-in, and what a merge does to it.

test_reliability.py explains the numbers of cases and faults in test names.
"""

import copy
import signal
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from relora_kernels import FusedReLoRaLinear, lora_linear, use_backend
from relora_kernels.layer import merge_layers
from relora_kernels.reference import merge as reference_merge


def trained(layer: FusedReLoRaLinear, size: float = 0.02) -> FusedReLoRaLinear:
    """Makes B nonzero, as after some training."""
    with torch.no_grad():
        layer.lora_B.normal_(0, size)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_from_linear_computes_what_the_linear_did(bias, dtype, device):
    linear = nn.Linear(24, 16, bias=bias, dtype=dtype, device=device)
    for parameter in linear.parameters():  # sums below 256: exact in every dtype and order
        parameter.data = torch.randint(-1, 2, parameter.shape, device=device).to(dtype)
    layer = FusedReLoRaLinear.from_linear(linear, r=4)
    x = torch.randint(-8, 9, (3, 24), device=device).to(dtype)
    assert torch.equal(layer(x), linear(x))
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert isinstance(layer, nn.Linear)


def test_parameters_and_defaults():
    layer = FusedReLoRaLinear(300, 200)
    named = dict(layer.named_parameters())
    assert {k: tuple(p.shape) for k, p in named.items()} == {
        "weight": (200, 300), "bias": (200,), "lora_A": (128, 300), "lora_B": (200, 128),
    }  # fmt: skip
    assert [k for k, p in named.items() if p.requires_grad] == ["bias", "lora_A", "lora_B"]
    assert layer.scaling == 0.25 and layer.r == 128 and layer.lora_alpha == 32
    assert FusedReLoRaLinear(8, 8, r=16, use_rslora=True).scaling == 8.0
    assert not layer.lora_B.any()
    bound = 300**-0.5
    assert layer.lora_A.abs().max() <= bound and layer.lora_A.std().item() == pytest.approx(
        bound / 3**0.5, rel=0.02
    )


@pytest.mark.parametrize(
    ("dtype", "lora_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32),
     (torch.float64, torch.float64)],
)  # fmt: skip
def test_masters_of_16_bit_weights_are_float32(dtype, lora_dtype):
    layer = FusedReLoRaLinear(8, 8, r=2, dtype=dtype)
    assert layer.weight.dtype == dtype and layer.lora_A.dtype == layer.lora_B.dtype == lora_dtype
    assert FusedReLoRaLinear(8, 8, r=2, dtype=dtype, lora_dtype=dtype).lora_A.dtype == dtype


@pytest.mark.parametrize("trainable_scaling", [False, True])
def test_gradients_live_after_wrap_and_after_every_merge_faults_1_2(trainable_scaling, device):
    layer = FusedReLoRaLinear(16, 12, r=4, trainable_scaling=trainable_scaling, device=device)
    x = torch.randn(8, 16, device=device)
    for _ in range(3):
        layer.zero_grad()
        layer(x).square().sum().backward()
        assert layer.lora_B.grad.any() and layer.lora_A.any()
        assert not layer.lora_A.grad.any()  # B is zero
        trained(layer)
        layer.zero_grad()
        layer(x).square().sum().backward()
        assert layer.lora_A.grad.any()
        if trainable_scaling:
            assert layer.lora_scaling.grad.any()
        layer.zero_grad()
        layer.merge()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_merge_keeps_the_function_and_adds_the_scaled_update_fault_3(rounding, dtype, device):
    layer = FusedReLoRaLinear(64, 48, r=8, lora_alpha=2, dtype=dtype, merge_rounding=rounding,
                              device=device)  # fmt: skip
    trained(layer)
    x = torch.randn(32, 64, device=device).to(dtype)
    before, y = layer.weight.double().clone(), layer(x).double()
    update = 0.25 * layer.lora_B.double() @ layer.lora_A.double()
    old_A = layer.lora_A.detach().clone()
    layer.merge()
    step = torch.finfo(dtype).eps * (before + update).abs()
    assert ((layer.weight.double() - before - update).abs() <= step + 1e-6).all()
    assert not layer.lora_B.any() and not torch.equal(layer.lora_A, old_A)
    assert layer.merge_count == 1
    # |dy| <= sum over k of |dW| |x|, and rounding of y itself.
    room = step @ x.double().abs().T
    assert (
        (layer(x).double() - y).abs() <= room.T + 4 * torch.finfo(dtype).eps * y.abs().max()
    ).all()


def test_trainable_scale_is_merged_and_restarts(device):
    layer = trained(FusedReLoRaLinear(16, 12, r=4, trainable_scaling=True, device=device))
    with torch.no_grad():
        layer.lora_scaling.fill_(0.3)
    x = torch.randn(5, 16, device=device)
    y = layer(x)
    torch.testing.assert_close(
        y,
        nn.functional.linear(x, layer.weight, layer.bias)
        + torch.tanh(layer.lora_scaling) * (x @ layer.lora_A.T @ layer.lora_B.T),
    )
    layer.merge()
    assert layer.lora_scaling.item() == 1.0
    torch.testing.assert_close(layer(x), y)


def test_compensated_is_the_default_for_16_bit_weights():
    layer = trained(FusedReLoRaLinear(256, 256, r=8, dtype=torch.bfloat16), 1e-4)
    start = layer.weight.double()
    total = torch.zeros_like(start)
    for _ in range(4):
        total += layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        layer.merge()
        trained(layer, 1e-4)
    kept = layer.weight.double() + layer.weight_residual.double() - start
    assert ((kept * total).sum() / total.square().sum()).item() >= 0.999
    assert layer.weight_residual.device.type == "cpu"


def test_named_layers_draw_from_seed_name_and_count_alone_fault_7():
    def draws(seed, name, dtype=torch.float32, merges=1):
        torch.manual_seed(int(torch.randint(1000, ())))  # torch's generator must not matter
        layer = FusedReLoRaLinear(16, 8, r=4, seed=seed, name=name, lora_dtype=dtype)
        for _ in range(merges):
            layer.merge()
        return layer.lora_A.detach()

    assert torch.equal(draws(1, "a"), draws(1, "a"))
    assert torch.equal(draws(1, "a", merges=3), draws(1, "a", merges=3))
    assert torch.equal(draws(1, "a").bfloat16(), draws(1, "a", torch.bfloat16))
    different = [
        draws(1, "a"),
        draws(2, "a"),
        draws(1, "b"),
        draws(1, "a", merges=2),
        draws(1, "a", merges=0),
    ]
    for i, a in enumerate(different):
        assert all(not torch.equal(a, b) for b in different[:i])


def test_weight_stays_frozen_while_training(device):
    layer = FusedReLoRaLinear(16, 8, r=4, device=device)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    before = layer.weight.clone()
    for _ in range(3):
        layer(torch.randn(4, 16, device=device)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(layer.weight, before) and layer.weight.grad is None


def test_an_update_that_is_not_finite_leaves_the_layer_alone_case43():
    layer = trained(FusedReLoRaLinear(16, 8, r=4))
    layer.lora_B.data[0, 0] = torch.nan
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(FloatingPointError, match="nothing was merged"):
        layer.merge()
    with pytest.raises(FloatingPointError):
        layer.to_linear()
    for k, v in layer.state_dict().items():
        assert torch.equal(v.nan_to_num(), before[k].nan_to_num())


def test_state_dict_round_trip_with_residual():
    layer = trained(FusedReLoRaLinear(32, 16, r=4, dtype=torch.bfloat16))
    layer.merge()
    state = copy.deepcopy(layer.state_dict())
    assert {"weight", "bias", "lora_A", "lora_B", "merge_count", "weight_residual"} == set(state)
    other = FusedReLoRaLinear(32, 16, r=4, dtype=torch.bfloat16)
    other.load_state_dict(state)
    for k, v in other.state_dict().items():
        assert torch.equal(v, state[k])
    fresh = FusedReLoRaLinear(32, 16, r=4, dtype=torch.bfloat16).state_dict()
    other.load_state_dict(fresh)  # saved before any merge: there is no remainder beside the weight
    assert not other.weight_residual.any()
    del fresh["weight_residual"]
    other.weight_residual.fill_(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing was merged, so nothing is lost
        other.load_state_dict(fresh)
    assert other.weight_residual is None
    del state["weight_residual"]
    with pytest.warns(
        UserWarning, match="weights in torch.bfloat16 are loaded without their weight_residual"
    ):
        other.load_state_dict(state)
    parent = nn.Sequential(nn.Identity(), layer)
    twin = nn.Sequential(nn.Identity(), FusedReLoRaLinear(32, 16, r=4, dtype=torch.bfloat16))
    twin.load_state_dict(parent.state_dict())
    assert torch.equal(twin[1].weight_residual, layer.weight_residual)


def test_widening_the_layer_adds_the_residual_to_the_weight():
    layer = trained(FusedReLoRaLinear(32, 16, r=4, dtype=torch.bfloat16))
    layer.merge()
    exact = layer.weight.float() + layer.weight_residual.float()
    layer.float()
    assert torch.equal(layer.weight, exact) and layer.weight_residual is None


@pytest.mark.parametrize(
    "casts", [["half"], ["float", "bfloat16"], ["half", "float", "double", "half"]]
)
def test_casts_keep_what_compensated_merges_could_not_store(casts, device):
    layer = trained(FusedReLoRaLinear(32, 16, r=4, dtype=torch.bfloat16))
    layer.merge()
    exact = layer.weight.double() + layer.weight_residual.double()
    for cast in casts:
        layer.to(device, getattr(torch, cast))
    layer.to("cpu")
    kept = layer.weight.double() + layer.weight_residual.double()
    assert (kept - exact).abs().max() <= 2**-16 * exact.abs().max()
    assert layer.weight_residual.dtype == layer.weight.dtype
    eps = torch.finfo(layer.weight.dtype).eps
    assert ((layer.weight.double() - exact).abs() <= eps / 2 * exact.abs() + 2**-24).all()
    trained(layer).merge()  # goes on


def test_a_cast_on_the_way_to_another_device():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    layer = FusedReLoRaLinear(8, 8, r=2, dtype=torch.bfloat16)
    layer.merge()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        layer.half()
        layer.weight_residual = torch.zeros(8, 8, dtype=torch.bfloat16)
        before = torch.empty(8, 8, dtype=torch.bfloat16, device="meta")
        layer._keep_cast(FakeTensor(mode, before, torch.device("cuda:0")))
    assert layer.weight_residual.dtype == torch.float16


def test_a_cast_without_room_for_the_residual_loses_none(monkeypatch):
    layer = trained(FusedReLoRaLinear(32, 16, r=4, dtype=torch.bfloat16))
    layer.merge()
    residual = layer.weight_residual.clone()
    monkeypatch.setattr(layer, "_host_residual", lambda: torch.empty(2**50))
    with pytest.raises(RuntimeError):
        layer.half()
    assert torch.equal(layer.weight_residual, residual)


def test_a_weight_that_no_merge_has_changed_is_cast_as_it_is():
    layer = FusedReLoRaLinear(32, 16, r=4)
    assert layer.bfloat16().rounding == "compensated" and layer.weight_residual is None


def test_a_weight_that_float16_does_not_hold_leaves_no_nan_behind():
    layer = FusedReLoRaLinear(8, 4, r=2, dtype=torch.bfloat16)
    layer.merge()
    layer.weight.data[0, 0] = 1e6
    layer.half()
    assert layer.weight[0, 0].isinf() and layer.weight_residual.isfinite().all()


def test_narrowing_from_linear_keeps_the_remainder():
    linear = nn.Linear(32, 16)
    wide = linear.weight.detach().clone()
    layer = FusedReLoRaLinear.from_linear(linear, r=4, weight_dtype=torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16 and layer.lora_A.dtype == torch.float32
    error = layer.weight.float() + layer.weight_residual.float() - wide
    assert error.abs().max() <= 2**-16 * wide.abs().max()
    assert torch.equal(linear.weight, wide)


def test_narrowing_from_linear_on_meta():
    linear = nn.Linear(32, 16, device="meta")
    layer = FusedReLoRaLinear.from_linear(linear, r=4, weight_dtype=torch.bfloat16)
    assert layer.weight.is_meta and layer.weight.dtype == torch.bfloat16


def test_to_linear_is_plain_and_trainable():
    layer = trained(FusedReLoRaLinear(32, 16, r=4, dtype=torch.bfloat16)).eval()
    layer.merge()
    trained(layer)
    total = layer.weight.double() + layer.weight_residual.double()
    total = total + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    linear = layer.to_linear()
    assert type(linear) is nn.Linear and linear.weight.requires_grad and not linear.training
    assert ((linear.weight.double() - total).abs() <= total.abs() * 2**-8).all()
    nn.Linear(32, 16, dtype=torch.bfloat16).load_state_dict(linear.state_dict())
    for k, v in layer.state_dict().items():
        assert torch.equal(v, before[k])


def test_dropout_only_in_training(device):
    layer = trained(FusedReLoRaLinear(32, 16, r=4, lora_dropout=0.5, device=device), 1.0)
    x = torch.randn(4, 32, device=device)
    plain = lora_linear(x, layer.weight, layer.lora_A, layer.lora_B, layer.scaling, layer.bias)
    assert not torch.equal(layer(x), plain)
    assert torch.equal(layer.eval()(x), plain)


def test_factors_of_a_merged_layer_without_its_weight_are_told_of():
    layer, other = (FusedReLoRaLinear(16, 8, r=4) for _ in range(2))
    layer.merge()
    trained = {key: value for key, value in layer.state_dict().items() if key != "weight"}
    with pytest.warns(UserWarning, match="without the weights that they were merged into"):
        other.load_state_dict(trained, strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.load_state_dict(trained, strict=False)  # its own
        other.load_state_dict(layer.state_dict())


def test_a_state_dict_on_meta_loads_as_nn_linears_does():
    layer = FusedReLoRaLinear(16, 8, r=4, dtype=torch.bfloat16)
    layer.merge()
    state = {key: value.to("meta") for key, value in layer.state_dict().items()}
    assert "weight_residual" in state
    before = layer.weight_residual.clone()
    with pytest.raises(RuntimeError, match="meta"):
        layer.load_state_dict(state)
    assert not layer.weight.is_meta and torch.equal(layer.weight_residual, before)
    layer.load_state_dict(state, assign=True)
    assert layer.weight.is_meta and layer.weight_residual is None


def test_meta_device_and_deepcopy():
    layer = FusedReLoRaLinear(16, 8, r=4, device="meta")
    assert layer.lora_A.is_meta and layer(torch.empty(3, 16, device="meta")).shape == (3, 8)
    real = layer.to_empty(device="cpu")
    real.reset_lora_parameters()
    assert not real.lora_B.any() and real.lora_A.any()
    twin = copy.deepcopy(trained(FusedReLoRaLinear(16, 8, r=4, dtype=torch.bfloat16)))
    twin.merge()
    assert twin.merge_count == 1


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"r": 0}, "r >= 1, got 0"),
        ({"r": 2.0}, "r >= 1, got 2.0"),
        ({"lora_dropout": 1.1}, "lora_dropout <= 1, got 1.1"),
        ({"merge_rounding": "up"}, "merge_rounding.*got 'up'"),
        ({"lora_alpha": 0}, "lora_alpha > 0, got 0"),
        ({"lora_alpha": float("nan")}, "finite lora_alpha"),
        ({"seed": "a"}, "seed to be an int64, got 'a'"),
        ({"dtype": torch.complex64}, "dtype to be a floating"),
        ({"lora_dtype": torch.int8}, "lora_dtype to be a floating"),
    ],
)
def test_bad_arguments_are_refused(kwargs, says):
    with pytest.raises(ValueError, match=says):
        FusedReLoRaLinear(8, 8, **kwargs)


def test_from_linear_takes_plain_linears_only():
    for module in (nn.Conv1d(2, 2, 1), FusedReLoRaLinear(4, 4, r=1), nn.Bilinear(2, 2, 2)):
        with pytest.raises(TypeError, match=f"nn.Linear, got {type(module).__name__}"):
            FusedReLoRaLinear.from_linear(module)


def test_a_bfloat16_merge_with_float32_input_says_autocast():
    layer = FusedReLoRaLinear(8, 8, r=2, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="autocast"):
        layer(torch.randn(2, 8))


def test_redraws_never_come_from_torchs_generator_fault_7():
    draws = []
    for seed in (1, 2):
        layer = FusedReLoRaLinear(8, 8, r=2)
        torch.manual_seed(seed)
        layer.merge()
        draws.append(layer.lora_A.detach())
    assert torch.equal(*draws)


def test_stochastic_merges_differ_by_layer_and_by_cycle():
    """If the random bits repeated, rounding errors would add up instead of cancelling."""
    errors = []
    for name, merges in (("a", 1), ("b", 1), ("a", 2)):
        layer = FusedReLoRaLinear(
            64, 64, r=2, dtype=torch.bfloat16, merge_rounding="stochastic", name=name
        )
        torch.manual_seed(0)
        start = torch.randn(64, 64).bfloat16()
        for _ in range(merges):
            layer.weight.data.copy_(start)
            layer.lora_A.data.fill_(1e-2)
            layer.lora_B.data.fill_(1e-2)
            layer.merge()
        errors.append(layer.weight.float() - start.float())
    for i, a in enumerate(errors):
        assert all(not torch.equal(a, b) for b in errors[:i])


def test_reset_parameters_starts_a_new_layer():
    layer = trained(FusedReLoRaLinear(8, 8, r=2, dtype=torch.bfloat16, name="x"))
    first = FusedReLoRaLinear(8, 8, r=2, dtype=torch.bfloat16, name="x").lora_A
    layer.merge()
    layer.reset_parameters()
    assert layer.merge_count == 0 and layer.weight_residual is None and not layer.lora_B.any()
    assert torch.equal(layer.lora_A, first)


def test_pending_gradients_refuse_the_layers_own_merge_case50():
    layer = FusedReLoRaLinear(8, 8, r=2)
    layer(torch.randn(2, 8)).sum().backward()
    with pytest.raises(RuntimeError, match="lora_B.grad.*zero_grad"):
        layer.merge()
    assert layer.merge_count == 0


def test_a_gradient_of_the_weight_from_before_is_dropped():
    """It comes from a full-rank warm start. No optimizer holds the frozen weight, so none would clear it."""
    linear = nn.Linear(8, 8)
    linear(torch.randn(2, 8)).sum().backward()
    layer = FusedReLoRaLinear.from_linear(linear, r=2)
    assert layer.weight.grad is None and layer.weight is linear.weight


def test_unloading_gives_the_dtype_back_that_narrowing_took():
    linear = nn.Linear(16, 8)
    exact = linear.weight.detach().clone()
    layer = FusedReLoRaLinear.from_linear(linear, r=2, weight_dtype=torch.bfloat16)
    back = layer.to_linear()
    assert back.weight.dtype == back.bias.dtype == torch.float32
    assert (back.weight - exact).abs().max() <= 2**-16 * exact.abs().max()
    back(torch.randn(2, 16))
    assert layer.to(torch.bfloat16).to_linear().weight.dtype == torch.bfloat16


def test_residual_of_a_narrow_checkpoint_goes_into_a_wide_weight():
    narrow = trained(FusedReLoRaLinear(16, 8, r=2, dtype=torch.bfloat16))
    narrow.merge()
    wide = FusedReLoRaLinear(16, 8, r=2)
    wide.load_state_dict(narrow.state_dict())
    assert torch.equal(wide.weight, narrow.weight.float() + narrow.weight_residual.float())
    with pytest.raises(
        RuntimeError, match=r"weight_residual: expected shape \(8, 16\), got \(4, 16\)"
    ):
        wide.load_state_dict({**narrow.state_dict(), "weight_residual": torch.zeros(4, 16)})


def test_no_features_as_nn_linear():
    assert FusedReLoRaLinear(0, 4, r=1, bias=False)(torch.empty(3, 0)).shape == (3, 4)
    layer = FusedReLoRaLinear(4, 0, r=1, bias=False)
    x = torch.randn(3, 4, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (3, 4)


def test_a_merge_of_another_rounding_keeps_the_residual():
    layer = trained(FusedReLoRaLinear(16, 8, r=2, dtype=torch.bfloat16))
    layer.merge()
    kept = layer.weight_residual.clone()
    layer.merge_rounding = "nearest"
    layer.merge()
    assert kept.any() and torch.equal(layer.weight_residual, kept)


def test_a_layer_listed_twice_merges_once_and_a_shared_weight_is_refused():
    layer, twin = (trained(FusedReLoRaLinear(6, 4, r=2, name="x")) for _ in "ab")
    twin.load_state_dict(layer.state_dict())
    merge_layers([layer, layer])
    twin.merge()
    for key, value in layer.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key]), key
    other = trained(FusedReLoRaLinear(6, 4, r=2))
    other.weight = layer.weight
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="merge: expected tensors in memory of their own"):
        merge_layers([layer, other])
    assert torch.equal(layer.weight, before) and layer.merge_count == 1 and other.merge_count == 0


@pytest.mark.parametrize("at", ["_merge", "_merged"])
def test_an_interrupt_takes_effect_when_the_layers_are_merged_and_restarted(monkeypatch, at):
    """Ctrl-C after W is written, and while residuals go back to the host."""
    layers, twins = (
        [trained(FusedReLoRaLinear(6, 4, r=2, name=n, dtype=torch.bfloat16)) for n in "xy"]
        for _ in range(2)
    )
    for layer, twin in zip(layers, twins):
        twin.load_state_dict(layer.state_dict())
    merge_layers(twins)

    def interrupted(original):
        def function(*args, **kwargs):
            result = original(*args, **kwargs)
            signal.raise_signal(signal.SIGINT)
            return result

        return function

    if at == "_merge":
        monkeypatch.setattr(reference_merge, "merge_", interrupted(reference_merge.merge_))
    else:
        monkeypatch.setattr(layers[0], "_merged", interrupted(layers[0]._merged))
    handler = signal.getsignal(signal.SIGINT)
    with use_backend("reference"), pytest.raises(KeyboardInterrupt):
        merge_layers(layers)
    assert signal.getsignal(signal.SIGINT) is handler
    for layer, twin in zip(layers, twins):
        expected = twin.state_dict()
        assert layer.state_dict().keys() == expected.keys()
        for key, value in layer.state_dict().items():
            assert torch.equal(value, expected[key]), key


def test_a_new_layers_state_dict_has_every_name_that_a_checkpoint_has():
    """torch.distributed.checkpoint writes into the tensors of a new model's state_dict, and reads no others."""
    trained(layer := FusedReLoRaLinear(32, 16, r=4, dtype=torch.bfloat16)).merge()
    new = FusedReLoRaLinear(32, 16, r=4, dtype=torch.bfloat16)
    for name, tensor in new.state_dict().items():
        tensor.copy_(layer.state_dict()[name])
    assert layer.weight_residual.any()
    assert torch.equal(new.weight_residual, layer.weight_residual)
    for no_residual in ({"dtype": torch.float32}, {"merge_rounding": "stochastic"}):
        options = {"dtype": torch.bfloat16, **no_residual}
        assert "weight_residual" not in FusedReLoRaLinear(8, 8, r=2, **options).state_dict()


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_changes_neither_merge_nor_unloading(autocast, device):
    layer = trained(FusedReLoRaLinear(32, 16, r=4, dtype=torch.bfloat16, name="x", device=device))
    twin = copy.deepcopy(layer)
    linear = layer.to_linear()
    layer.merge()
    with torch.autocast(device, autocast):
        assert torch.equal(twin.to_linear().weight, linear.weight)
        twin.merge()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(twin.state_dict()[name], tensor), name


def test_merges_in_inference_mode_and_outside_follow_one_another():
    layer = trained(FusedReLoRaLinear(32, 16, r=4, dtype=torch.bfloat16))
    with torch.inference_mode():
        layer.merge()
    trained(layer).merge()
    assert layer.merge_count == 2


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B", "lora_scaling"])
def test_a_merge_into_what_is_computed_is_refused(name):
    class Same(nn.Module):
        def forward(self, tensor):
            return tensor * 1.0

        def right_inverse(self, tensor):
            return tensor

    layer = trained(FusedReLoRaLinear(8, 8, r=2, trainable_scaling=True))
    parametrize.register_parametrization(layer, name, Same())
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=f"FusedReLoRaLinear.{name}, which is computed"):
        layer.merge()
    for key, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[key])
