"""reset_optimizer: what it does to Adam's moments, what it refuses, and why masks are paired."""

import copy
import warnings

import pytest
import torch

from relora_kernels import reset_optimizer


def adam(cls=torch.optim.AdamW, steps=2, sizes=((6, 8), (40, 3), (1,)), **kwargs):
    """(optimizer, parameters, idle parameter) after some steps; the idle one has had no gradient."""
    params = [torch.nn.Parameter(torch.randn(s)) for s in sizes]
    idle = torch.nn.Parameter(torch.randn(5))
    optimizer = cls([{"params": params}, {"params": [idle]}], lr=1e-3, **kwargs)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return optimizer, params, idle


def moments(optimizer, p):
    return optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]


@pytest.mark.parametrize("mode", ["magnitude", "random", "zero"])
def test_in_place_and_only_the_given_parameters(mode):
    optimizer, params, idle = adam()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    pointers = [t.data_ptr() for p in params for t in moments(optimizer, p)]
    reset_optimizer(optimizer, [*params[:2], idle], mode, 0.5)
    assert [t.data_ptr() for p in params for t in moments(optimizer, p)] == pointers
    for key, t in optimizer.state[params[2]].items():
        assert torch.equal(t, before[2][key])
    for i, p in enumerate(params[:2]):
        for key, t in zip(("exp_avg", "exp_avg_sq"), moments(optimizer, p)):
            assert not torch.equal(t, before[i][key])
            assert torch.equal(t[t != 0], before[i][key][t != 0])
        assert optimizer.state[p]["step"] == 2
    assert idle not in optimizer.state or not optimizer.state[idle]


def test_paired_masks_come_from_the_first_moment():
    optimizer, params, _ = adam()
    before = [[t.clone() for t in moments(optimizer, p)] for p in params]
    reset_optimizer(optimizer, params, "magnitude", 0.9)
    for p, (m0, v0) in zip(params, before):
        keep = m0.abs() > torch.quantile(m0.abs(), 0.9)
        m, v = moments(optimizer, p)
        assert torch.equal(m, m0 * keep) and torch.equal(v, v0 * keep)


def test_independent_masks_by_name_and_with_a_warning():
    optimizer, params, _ = adam()
    before = [[t.clone() for t in moments(optimizer, p)] for p in params]
    with pytest.warns(UserWarning, match="paired=True"):
        reset_optimizer(optimizer, params, "magnitude", 0.8, paired=False)
    for p, old in zip(params, before):
        for t, t0 in zip(moments(optimizer, p), old):
            assert torch.equal(t, t0 * (t0.abs() > torch.quantile(t0.abs(), 0.8)))


def test_random_masks_are_paired_and_repeatable():
    kept = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        optimizer, params, _ = adam(sizes=((50, 60), (50, 60)))
        reset_optimizer(optimizer, params, "random", 0.7, seed=seed)
        masks = [[t != 0 for t in moments(optimizer, p)] for p in params]
        assert all(torch.equal(m, v) for m, v in masks)
        assert not torch.equal(masks[0][0], masks[1][0])  # same shape, other draws
        assert masks[0][0].float().mean().item() == pytest.approx(0.3, abs=0.03)
        kept.append(masks[0][0])
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("mode", ["magnitude", "random", "zero"])
def test_amsgrad_maxima_are_pruned_too(mode, paired):
    optimizer, params, _ = adam(amsgrad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reset_optimizer(optimizer, params, mode, 0.5, paired=paired)
    for p in params[:2]:
        state = optimizer.state[p]
        assert (state["max_exp_avg_sq"] == 0).float().mean() >= 0.3
        if paired:
            assert torch.equal(state["max_exp_avg_sq"] == 0, state["exp_avg"] == 0)
            assert torch.equal(state["exp_avg_sq"] == 0, state["exp_avg"] == 0)


@pytest.mark.parametrize(
    "cls", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam]
)
def test_reset_step(cls):
    optimizer, params, _ = adam(cls)
    reset_optimizer(optimizer, params[:1], "zero", reset_step=True)
    assert optimizer.state[params[0]]["step"] == 0 and optimizer.state[params[1]]["step"] == 2
    fresh = torch.nn.Parameter(params[0].detach().clone())
    other = cls([fresh], lr=1e-3)
    for _ in range(3):  # the same updates as from a new optimizer
        params[0].grad = torch.randn_like(params[0])
        fresh.grad = params[0].grad.clone()
        optimizer.step()
        other.step()
        torch.testing.assert_close(params[0], fresh)


def update_after_reset(trained, **reset):
    """(RMS, largest) element of the first update after a reset, in units of the learning rate."""
    optimizer = copy.deepcopy(trained)
    (p,) = optimizer.param_groups[0]["params"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reset_optimizer(optimizer, [p], **reset)
    before = p.detach().clone()
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    step = (p.detach() - before).abs()
    return step.square().mean().sqrt().item(), step.max().item()


def test_first_update_after_a_reset():
    """Why paired is the default: independent masks keep m where v is gone, and the update explodes."""
    p = torch.nn.Parameter(torch.zeros(48, 48))
    trained = torch.optim.Adam([p], lr=1.0)
    for _ in range(1500):
        p.grad = torch.randn(48, 48)
        trained.step()
    _, independent_max = update_after_reset(trained, mode="magnitude", paired=False)
    paired_rms, paired_max = update_after_reset(trained, mode="magnitude")
    zero_rms, zero_max = update_after_reset(trained, mode="zero")
    # 0.1 g / sqrt(0.001 g^2): 3.16 x lr where a long-run step count is kept, here step 1501.
    assert zero_max == pytest.approx(0.1 / 0.001**0.5 * (1 - 0.999**1501) ** 0.5, rel=1e-3)
    fresh_rms, fresh_max = update_after_reset(trained, mode="zero", reset_step=True)
    assert fresh_max == pytest.approx(1.0, rel=1e-3) and fresh_rms == pytest.approx(1.0, rel=1e-3)
    assert paired_max < 1.5 * zero_max and paired_rms < 1.1 * zero_rms
    assert independent_max > 1000


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad])
def test_optimizers_without_adam_moments_are_refused_by_name_case48(cls):
    optimizer, params, _ = adam(cls)
    if cls is torch.optim.SGD:
        for group in optimizer.param_groups:
            group["momentum"] = 0.9
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(TypeError, match=f"no 'exp_avg'.*from {cls.__name__}.*AdamW"):
        reset_optimizer(optimizer, params)
    assert str(optimizer.state_dict()) == str(before)


def test_eight_bit_codes_are_refused_and_left_alone_case48():
    class Adam8bit(torch.optim.AdamW):
        pass

    optimizer, params, _ = adam(Adam8bit)
    codes = torch.randint(0, 256, (6, 8), dtype=torch.uint8)
    optimizer.state[params[0]] = {"step": 2, "state1": codes.clone(), "state2": codes.clone()}
    with pytest.raises(TypeError, match="state1, state2, step.*Adam8bit"):
        reset_optimizer(optimizer, params)
    optimizer.state[params[0]] = {"step": 2, "exp_avg": codes.clone(), "exp_avg_sq": codes.clone()}
    untouched = [t.clone() for t in moments(optimizer, params[1])]
    for mode in ("magnitude", "random", "zero"):
        with pytest.raises(TypeError, match="uint8.*Adam8bit"):
            reset_optimizer(optimizer, params[::-1], mode)
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], codes)
    assert all(torch.equal(a, b) for a, b in zip(moments(optimizer, params[1]), untouched))


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [({"mode": "half"}, "got 'half'"), ({"ratio": 2.0}, "0 <= ratio <= 1, got 2.0")],
)
def test_bad_arguments_are_refused(kwargs, says):
    optimizer, params, _ = adam()
    with pytest.raises(ValueError, match=says):
        reset_optimizer(optimizer, params, **kwargs)
    with pytest.raises(ValueError, match=r"params\[0\] \(3,\).*lora_parameters"):
        reset_optimizer(optimizer, [torch.nn.Parameter(torch.ones(3))])


def test_one_parameter_and_generators_are_taken():
    optimizer, params, _ = adam()
    reset_optimizer(optimizer, params[0], "zero")
    reset_optimizer(optimizer, (p for p in params), "zero")
    assert not any(t.any() for p in params for t in moments(optimizer, p))


def test_random_resets_without_a_seed_follow_torchs_generator():
    masks = []
    for seed in (1, 1, 2):
        optimizer, params, _ = adam(sizes=((50, 60),))
        torch.manual_seed(seed)
        reset_optimizer(optimizer, params, "random", 0.5)
        masks.append(moments(optimizer, params[0])[0] != 0)
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])


@pytest.mark.parametrize("args", [(None, []), ("adam", []), (None, None)])
def test_what_is_no_optimizer_is_refused(args):
    with pytest.raises(TypeError, match="reset_optimizer: expected"):
        reset_optimizer(*args)


@pytest.mark.parametrize("mode", ["magnitude", "zero"])
def test_only_random_resets_draw(mode):
    parameter = torch.nn.Parameter(torch.ones(8))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    state = torch.get_rng_state()
    reset_optimizer(optimizer, [parameter], mode)
    assert torch.equal(torch.get_rng_state(), state)


class Wrapping(torch.optim.Optimizer):
    """Like accelerate's wrapper; with `own`, like Lookahead, which keeps state itself."""

    def __init__(self, optimizer, own=None):
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups
        self.state = optimizer.state if own is None else own


def test_state_is_found_in_a_wrapped_optimizer_unless_the_wrapper_keeps_its_own():
    p = torch.nn.Parameter(torch.ones(4))
    inner = torch.optim.AdamW([p])
    p.grad = torch.ones(4)
    inner.step()
    for own in (None, {}):
        inner.state[p]["exp_avg"].fill_(1.0)
        reset_optimizer(Wrapping(inner, own), [p], "zero")
        assert not inner.state[p]["exp_avg"].any()
    slow = Wrapping(inner, {p: {"slow_param": torch.ones(4)}})
    with pytest.raises(TypeError, match="no 'exp_avg' .state: slow_param. from Wrapping"):
        reset_optimizer(slow, [p], "zero")
    named = torch.optim.AdamW([p])
    named.optim = named.optimizer = "adamw"
    reset_optimizer(named, [p], "zero")
