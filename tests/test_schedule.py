"""The jagged learning rate, and one boundary for merge, reset and restart."""

import copy
import json
import warnings

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from relora_kernels import (
    FusedReLoRaLinear,
    JaggedLR,
    ReLoRaSchedule,
    cosine_with_warmup,
    lora_parameters,
)
from relora_kernels import schedule as schedule_module
from relora_kernels.model import relora_layers


def some_optimizer(lr=1.0, groups=1):
    return torch.optim.AdamW(
        [
            {"params": [torch.nn.Parameter(torch.zeros(2))], "lr": lr * (i + 1)}
            for i in range(groups)
        ]
    )


def rates(scheduler, optimizer, steps, group=0):
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[group]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_check_values_of_the_jagged_cosine():
    schedule = JaggedLR(some_optimizer(), cosine_with_warmup(500, 20000, 0.1), 5000, 100)
    values = {4999: 0.8869, 5000: 0.0, 5001: 0.00882, 5100: 0.88198, 250: 0.5, 20000: 0.0}
    for step, value in values.items():
        assert schedule.multiplier(step) == pytest.approx(value, abs=5e-5), step
    # The warm-up rises towards the base schedule's value at the end of the warm-up.
    assert schedule.multiplier(5001) == pytest.approx(0.0088198, abs=5e-7)
    assert schedule.multiplier(5050) == pytest.approx(0.440989, abs=5e-6)
    assert cosine_with_warmup(500, 20000, 0.1)(20000) == pytest.approx(0.1)
    assert cosine_with_warmup(500, 20000, 0.1)(30000) == pytest.approx(0.1)


def test_the_optimizer_gets_these_rates_with_each_group_its_own_base():
    optimizer = some_optimizer(0.5, groups=2)
    scheduler = JaggedLR(optimizer, cosine_with_warmup(2, 40), 10, 3)
    for step in range(35):
        for i, group in enumerate(optimizer.param_groups):
            assert group["lr"] == pytest.approx(0.5 * (i + 1) * scheduler.multiplier(step))
        optimizer.step()
        scheduler.step()


def test_any_base_schedule():
    constant = JaggedLR(some_optimizer(), lambda t: 1.0, 10, 5)
    assert [constant.multiplier(t) for t in (0, 9, 10, 11, 14, 15, 20)] == [1, 1, 0, 0.2, 0.8, 1, 0]
    transformers = pytest.importorskip("transformers")
    linear = transformers.get_linear_schedule_with_warmup(some_optimizer(), 5, 100)
    assert JaggedLR(some_optimizer(), linear, 10, 5).multiplier(50) == 0.0


BASES = [
    lambda o: LambdaLR(o, [lambda t: 1 / (t + 1), lambda t: 0.5]),
    lambda o: CosineAnnealingLR(o, 40, eta_min=0.01),
    lambda o: lr_scheduler.OneCycleLR(o, [1.0, 2.0], total_steps=50, cycle_momentum=False),
    lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 5), lr_scheduler.StepLR(o, 7)], [5]
    ),
    lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
]


@pytest.mark.parametrize("base", BASES)
def test_torchs_own_schedulers_as_base(base):
    plain, optimizer = some_optimizer(groups=2), some_optimizer(groups=2)
    expected, scheduler = base(plain), JaggedLR(optimizer, base(optimizer), 10, 3)
    rates = []
    for step in range(40):
        rates.append([g["lr"] for g in plain.param_groups])
        if step < 10 or step % 10 >= 3:
            assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(rates[-1]), step
        for o, s in ((plain, expected), (optimizer, scheduler)):
            o.step()
            s.step()
    json.dumps(scheduler.state_dict())
    with pytest.raises(ValueError, match="not stepped yet, got LambdaLR at step 1"):
        stepped = LambdaLR(some_optimizer(), lambda t: 1.0)
        stepped.optimizer.step()
        stepped.step()
        JaggedLR(some_optimizer(), stepped, 10, 3)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("stop", [0, 2, 7, 10, 25])  # 10: a restart, where the learning rate is 0
def test_resume_in_any_order(base, stop):
    """The optimizer's state holds the step's learning rate. If it is loaded first, the scheduler must not take that
    rate for its initial one."""

    optimizer = some_optimizer(groups=2)
    scheduler = JaggedLR(optimizer, base(optimizer), 10, 3)
    rates(scheduler, optimizer, stop)
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    expected = rates(scheduler, optimizer, 20, group=1)

    first = some_optimizer(groups=2)
    first.load_state_dict(saved[0])
    resumed = JaggedLR(first, base(first), 10, 3)
    resumed.load_state_dict(saved[1])
    assert rates(resumed, first, 20, group=1) == expected
    for optimizer_first in (False, True):
        last = some_optimizer(groups=2)
        resumed = JaggedLR(last, base(last), 10, 3)
        if optimizer_first:
            last.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        if not optimizer_first:
            last.load_state_dict(saved[0])
        assert rates(resumed, last, 20, group=1) == expected


def test_a_one_cycle_schedule_ends_with_its_last_rate():
    """The warm-up after the last restart asks for the rate of a step beyond the end."""
    base = BASES[2]
    optimizer, plain = some_optimizer(groups=2), some_optimizer(groups=2)
    scheduler, expected = JaggedLR(optimizer, base(optimizer), 30, 25), base(plain)
    for _ in range(49):
        for o, s in ((optimizer, scheduler), (plain, expected)):
            o.step()
            s.step()
    # Step 49 is its last: initial_lr / final_div_factor.
    assert scheduler.multiplier(55) == pytest.approx(1e-4)
    assert scheduler.multiplier(49) == pytest.approx(19 / 25 * 1e-4)
    cycling = lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=50)
    for base in (cycling, lr_scheduler.ChainedScheduler([cycling])):
        with pytest.raises(ValueError, match="learning rates alone, got .* with cycle_momentum"):
            JaggedLR(optimizer, base, 10, 3)


@pytest.mark.parametrize(
    "base", [BASES[0], *BASES[3:], lambda o: lambda t: 0.9**t, lambda o: CosineAnnealingLR(o, 40)]
)
@pytest.mark.parametrize("optimizer_first", [False, True])
def test_a_resumed_run_keeps_its_rates_whatever_the_new_optimizer_began_with(base, optimizer_first):
    """For base schedules that scale the optimizer's rates; OneCycleLR and eta_min set rates of their own."""
    optimizer, other = some_optimizer(groups=2), some_optimizer(lr=2.0, groups=2)
    scheduler, resumed = (JaggedLR(o, base(o), 10, 3) for o in (optimizer, other))
    rates(scheduler, optimizer, 12)
    states = [(other, copy.deepcopy(optimizer.state_dict())), (resumed, scheduler.state_dict())]
    for target, state in states if optimizer_first else reversed(states):
        target.load_state_dict(state)
    expected = rates(scheduler, optimizer, 20, group=1)
    assert rates(resumed, other, 20, group=1) == pytest.approx(expected)


@pytest.mark.parametrize("stop", [3, 9])
def test_a_part_of_a_sequence_leaves_the_loaded_rate_alone(stop):
    """The current rate may come from this part or from another; the optimizer's state holds it."""

    def sequence(optimizer):
        parts = (
            lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5),
            JaggedLR(optimizer, lambda t: 0.9**t, 10, 3),
        )
        return lr_scheduler.SequentialLR(optimizer, list(parts), [5])

    optimizer, other = some_optimizer(), some_optimizer()
    scheduler, resumed = sequence(optimizer), sequence(other)
    rates(scheduler, optimizer, stop)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.load_state_dict(scheduler.state_dict())
    assert rates(resumed, other, 20) == rates(scheduler, optimizer, 20)


def test_states_of_another_number_of_groups_are_refused():
    state = JaggedLR(some_optimizer(), lambda t: 1.0, 10, 3).state_dict()
    with pytest.raises(ValueError, match="expected 2 param groups, got 1"):
        JaggedLR(some_optimizer(groups=2), lambda t: 1.0, 10, 3).load_state_dict(state)


def test_no_warmup_means_no_dip_and_total_steps_ends_the_restarts():
    assert JaggedLR(some_optimizer(), lambda t: 1.0, 10, 0).multiplier(10) == 1.0
    ending = JaggedLR(some_optimizer(), lambda t: 1.0, 10, 5, total_steps=30)
    assert ending.multiplier(20) == 0.0 and ending.multiplier(30) == 1.0
    assert [ending.restarts_due(t) for t in (0, 9, 10, 29, 30, 31, 45)] == [0, 0, 1, 2, 2, 2, 2]


def test_a_warm_up_that_the_run_ends_in_asks_for_no_rate_beyond_the_end():
    table = [1 - t / 100 for t in range(100)]
    schedule = JaggedLR(some_optimizer(), lambda t: table[t], 30, 20, total_steps=100)
    # And not 9 / 20 * (1 - 110 / 100).
    assert schedule.multiplier(99) == pytest.approx(9 / 20 * 0.01)
    assert schedule.multiplier(45) == pytest.approx(15 / 20 * 0.5)
    assert all(schedule.multiplier(t) >= 0 for t in range(100))


def test_anneal_before_a_restart():
    schedule = JaggedLR(some_optimizer(), lambda t: 1.0, 10, 2, anneal_steps=3, total_steps=20)
    assert [schedule.multiplier(t) for t in range(5, 13)] == [1, 1, 0.75, 0.5, 0.25, 0, 0.5, 1]
    assert [schedule.multiplier(t) for t in range(16, 20)] == [1, 1, 1, 1]  # no restart at the end


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((lambda t: 1.0, 0, 0), "restart_every >= 1, got 0"),
        ((lambda t: 1.0, 10, -1), "restart_warmup_steps >= 0"),
        ((lambda t: 1.0, 10, 11), "<= restart_every = 10, got 11"),
        ((0.5, 10, 1), "function step -> multiplier.*got float"),
    ],
)
def test_bad_schedules_are_refused(args, says):
    with pytest.raises(ValueError, match=says):
        JaggedLR(some_optimizer(), *args)
    with pytest.raises(ValueError, match="warmup_steps < total_steps, got 10 and 10"):
        cosine_with_warmup(10, 10)


def small_run(restart_every=4, total=14, state=None, model=None, steps=None, **kwargs):
    """A plain training loop; returns (model, schedule, optimizer, log of (step, lr, restarted))."""
    if model is None:
        torch.manual_seed(1)
        model = torch.nn.Sequential(FusedReLoRaLinear(8, 8, r=2, name="0", lora_dropout=0.0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    schedule = ReLoRaSchedule(
        model, optimizer, lambda t: 1.0, restart_every, 2, total_steps=total, **kwargs
    )
    if state is not None:
        schedule.load_state_dict(state["schedule"])
        optimizer.load_state_dict(state["optimizer"])
    log = []
    for step in range(schedule.lr_scheduler.last_epoch, total if steps is None else steps):
        generator = torch.Generator().manual_seed(step)
        rate = optimizer.param_groups[0]["lr"]
        model(torch.randn(4, 8, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        log.append((step + 1, rate, schedule.step()))
    return model, schedule, optimizer, log


def test_one_boundary_for_merge_reset_and_rate_fault_4():
    model, schedule, optimizer, log = small_run(reset_mode="zero")
    assert [step for step, _, restarted in log if restarted] == [4, 8, 12]
    assert [step - 1 for step, rate, _ in log if rate == 0.0] == [4, 8, 12]
    assert schedule.cycle == model[0].merge_count == 3
    # at total_steps nothing follows, so there is no restart: the factors hold the last cycle
    model, schedule, _, log = small_run(total=12)
    assert [step for step, _, restarted in log if restarted] == [4, 8]
    assert model[0].lora_B.any()


def test_the_reset_touches_the_factors_alone():
    model, _, optimizer, _ = small_run(total=5, steps=4, reset_mode="zero")
    factors = set(lora_parameters(model))
    for p, state in optimizer.state.items():
        assert state["exp_avg"].any() != (p in factors)


def test_reset_mode_none_leaves_the_moments():
    model, _, optimizer, log = small_run(total=5, steps=4, reset_mode=None)
    assert log[-1][2] and all(
        s["exp_avg"].any() for p, s in optimizer.state.items() if p is not model[0].lora_A
    )


def test_a_skipped_scheduler_step_moves_all_three_together():
    """E.g. after a skipped optimizer step: the boundary depends only on the scheduler's count."""
    model, schedule, optimizer, _ = small_run(total=100, steps=3)
    assert not schedule.restart_if_due() and model[0].merge_count == 0
    schedule.lr_scheduler.step()
    assert schedule.restart_if_due() and optimizer.param_groups[0]["lr"] == 0.0
    assert not schedule.restart_if_due() and model[0].merge_count == 1


def test_resume_continues_the_same_run_fault_6():
    whole, _, _, log = small_run(reset_mode="random", reset_ratio=0.5)
    for stop in (3, 4, 6, 8):
        model, schedule, optimizer, _ = small_run(steps=stop, reset_mode="random", reset_ratio=0.5)
        state = {"schedule": schedule.state_dict(), "optimizer": optimizer.state_dict()}
        json.dumps(state["schedule"])  # plain numbers
        fresh = torch.nn.Sequential(FusedReLoRaLinear(8, 8, r=2, name="0"))
        fresh.load_state_dict(model.state_dict())
        _, schedule, _, rest = small_run(
            state=state, model=fresh, reset_mode="random", reset_ratio=0.5
        )
        assert rest == log[stop:]
        for key, tensor in fresh.state_dict().items():
            assert torch.equal(tensor, whole.state_dict()[key]), key


def test_resume_with_other_restarts_is_refused():
    _, schedule, _, _ = small_run(steps=2)
    _, other, _, _ = small_run(restart_every=5, steps=1)
    with pytest.raises(ValueError, match="restart_every = 5 as constructed, got 4"):
        other.load_state_dict(schedule.state_dict())


def test_a_refused_merge_stays_due_and_changes_nothing():
    model, schedule, optimizer, _ = small_run(steps=3, total=100)
    schedule.lr_scheduler.step()
    good = model[0].lora_A.data[0, 0].clone()
    model[0].lora_A.data[0, 0] = torch.nan
    weight = model[0].weight.clone()
    with pytest.raises(FloatingPointError):
        schedule.restart_if_due()
    assert torch.equal(model[0].weight, weight) and schedule.cycle == 0
    model[0].lora_A.data[0, 0] = good
    assert schedule.restart_if_due() and schedule.cycle == 1


def test_an_unfit_optimizer_is_refused_before_any_merge_case48():
    model = torch.nn.Sequential(FusedReLoRaLinear(8, 8, r=2))
    other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="after apply_relora"):
        ReLoRaSchedule(model, other, lambda t: 1.0, 4, 2)
    with pytest.raises(ValueError, match="apply_relora"):
        ReLoRaSchedule(torch.nn.Linear(2, 2), other, lambda t: 1.0, 4, 2)
    model, schedule, optimizer, _ = small_run(steps=3, total=100)
    optimizer.state[model[0].lora_A] = {"state1": torch.zeros(2, 8, dtype=torch.uint8)}
    schedule.lr_scheduler.step()
    with pytest.raises(TypeError, match="state1"):
        schedule.restart_if_due()
    assert model[0].merge_count == 0


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adafactor])
def test_other_optimizers_are_refused_before_their_first_step_case48(kind):
    """Their first step creates the state that the reset would refuse. If nothing is reset, any optimizer will do."""
    model = torch.nn.Sequential(FusedReLoRaLinear(8, 8, r=2))
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with pytest.raises(TypeError, match=rf"got {kind.__name__}.*reset_mode=None"):
        ReLoRaSchedule(model, optimizer, lambda t: 1.0, 4, 2)
    schedule = ReLoRaSchedule(model, optimizer, lambda t: 1.0, 4, 2, reset_mode=None)
    for _ in range(4):
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert model[0].merge_count == 1


class OneMoment(torch.optim.Optimizer):
    """An unknown class of optimizer, with Lion's state."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1e-2})

    def step(self):
        for p in self.param_groups[0]["params"]:
            moment = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
            p.data -= 1e-2 * moment.lerp_(p.grad, 0.1).sign()


def test_an_optimizer_of_another_state_is_refused_behind_its_first_step():
    model = torch.nn.Sequential(FusedReLoRaLinear(8, 8, r=2))
    optimizer = OneMoment([p for p in model.parameters() if p.requires_grad])
    schedule = ReLoRaSchedule(model, optimizer, lambda t: 1.0, 1000, 2)
    assert not schedule.step()  # after a skipped step
    assert not any(optimizer.state[p] for p in optimizer.param_groups[0]["params"])
    assert not schedule.step()  # after one that left empty state
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    with pytest.raises(TypeError, match="no 'exp_avg_sq' .*from OneMoment"):
        schedule.step()


def test_a_restart_without_any_optimizer_state_is_told():
    """As with a wrapper that keeps the state in another optimizer."""
    model = torch.nn.Sequential(FusedReLoRaLinear(8, 8, r=2))
    model[0].lora_B.data.fill_(1.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    schedule = ReLoRaSchedule(model, optimizer, lambda t: 1.0, 1, 0)
    with pytest.warns(UserWarning, match="no state in AdamW, so no moments are reset"):
        optimizer.step()  # without gradients it creates no state
        schedule.step()


def test_frozen_factors_need_no_optimizer_and_untrained_ones_are_told():
    model = torch.nn.Sequential(*(FusedReLoRaLinear(8, 8, r=2) for _ in range(3)))
    model[0].lora_A.requires_grad_(False)
    model[2].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    schedule = ReLoRaSchedule(model, optimizer, lambda t: 1.0, 4, 2)
    for _ in range(4):
        model[0](torch.randn(4, 8)).square().mean().backward()  # bypasses model[1]
        optimizer.step()
        optimizer.zero_grad()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            schedule.step()
    assert len(found) == 1 and "1 of 3 layers come to a restart with lora_B = 0 (1)" in str(
        found[0].message
    )
    assert [int(layer.merge_count) for layer in model] == [1, 1, 1]


def test_independent_masks_with_a_short_warmup_warn():
    model = torch.nn.Sequential(FusedReLoRaLinear(8, 8, r=2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.warns(UserWarning, match="49 steps, under 50"):
        ReLoRaSchedule(model, optimizer, lambda t: 1.0, 400, 49, paired=False)
    with pytest.raises(ValueError, match="reset_mode"):
        ReLoRaSchedule(model, optimizer, lambda t: 1.0, 400, 49, reset_mode="half")


def test_function_is_unchanged_over_a_restart():
    model, schedule, _, _ = small_run(steps=3, total=100)
    x = torch.randn(5, 8)
    before = model(x)
    schedule.lr_scheduler.step()
    assert schedule.restart_if_due()
    torch.testing.assert_close(model(x), before)
    assert relora_layers(model)[0][1].merge_count == 1


def test_a_learning_rate_that_is_a_tensor():
    def rates(lr, steps=16):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=lr)
        scheduler = JaggedLR(optimizer, lr_scheduler.StepLR(optimizer, 3, 0.5), 10, 2)
        found = []
        for _ in range(steps):
            found.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            scheduler.step()
        return found

    assert rates(torch.tensor(1.0)) == pytest.approx(rates(1.0))


def test_random_resets_differ_from_restart_to_restart():
    model, schedule, optimizer, _ = small_run(
        steps=3, total=100, reset_mode="random", reset_ratio=0.5
    )
    masks = []
    for _ in range(2):
        state = optimizer.state[model[0].lora_A]
        state["exp_avg"].fill_(1.0)
        while not schedule.step():
            pass
        masks.append(state["exp_avg"] != 0)
    assert not torch.equal(*masks)


def test_values_that_mean_nothing_are_refused():
    for kwargs in ({"restart_every": 2.5}, {"restart_every": True}, {"total_steps": 0}):
        with pytest.raises(ValueError, match="whole number"):
            JaggedLR(
                some_optimizer(),
                lambda t: 1.0,
                **{"restart_every": 10, "restart_warmup_steps": 1, **kwargs},
            )
    with pytest.raises(TypeError, match="torch optimizer, got None"):
        JaggedLR(None, lambda t: 1.0, 10, 1)
    with pytest.raises(ValueError, match="restart_every = 10 as constructed, got None"):
        JaggedLR(some_optimizer(), lambda t: 1.0, 10, 1).load_state_dict({"last_epoch": 3})


# --- restarts that are cut short -----------------------------------------------------------------


def three_layers():
    torch.manual_seed(2)
    return torch.nn.Sequential(*(FusedReLoRaLinear(8, 8, r=2, name=str(i)) for i in range(3)))


def fail_at(patch, place, error):
    """The restart raises `error` before any merge, after the first layer's, before its reset, or after it."""
    reset = schedule_module.reset_optimizer

    def merge_one_layer(model):
        next(m for m in model.modules() if isinstance(m, FusedReLoRaLinear)).merge()
        raise error

    def fail_without_reset(*args, **kwargs):
        raise error

    def fail_after_reset(*args, **kwargs):
        reset(*args, **kwargs)
        raise error

    name, function = {
        "before any merge": ("merge_and_reinit", fail_without_reset),
        "between two merges": ("merge_and_reinit", merge_one_layer),
        "before the reset": ("reset_optimizer", fail_without_reset),
        "after the reset": ("reset_optimizer", fail_after_reset),
    }[place]
    patch.setattr(schedule_module, name, function)


PLACES = ["before any merge", "between two merges", "before the reset", "after the reset"]


@pytest.mark.parametrize("mode", ["magnitude", "random", "zero"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError()])
@pytest.mark.parametrize("place", PLACES)
def test_a_restart_cut_short_is_completed_and_never_repeated_case39(
    monkeypatch, mode, error, place
):
    """In the same process, and from a state_dict saved in between."""
    expected, *_ = small_run(model=three_layers(), steps=6, total=100, reset_mode=mode)
    for through_state in (False, True):
        model, schedule, optimizer, _ = small_run(
            model=three_layers(), steps=3, total=100, reset_mode=mode
        )
        generator = torch.Generator().manual_seed(3)
        model(torch.randn(4, 8, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with monkeypatch.context() as patch:
            fail_at(patch, place, error)
            with pytest.raises(type(error)):
                schedule.step()
        assert schedule.cycle == 0 and schedule.lr_scheduler.restarting is not None
        if through_state:
            state = json.loads(json.dumps(schedule.state_dict()))
            moments = optimizer.state_dict()
            saved, model = model.state_dict(), three_layers()
            model.load_state_dict(saved)
            _, schedule, optimizer, _ = small_run(
                model=model, steps=0, total=100, reset_mode=mode,
                state={"schedule": state, "optimizer": moments},
            )  # fmt: skip
        assert schedule.restart_if_due() and not schedule.restart_if_due()
        assert [int(layer.merge_count) for layer in model] == [1, 1, 1]
        for step in (4, 5):
            generator = torch.Generator().manual_seed(step)
            model(torch.randn(4, 8, generator=generator)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected.state_dict()[key]), key


def test_a_restart_cut_short_is_completed_without_the_wrapper_that_it_began_in(monkeypatch):
    class Wrapper(torch.nn.Module):  # like DistributedDataParallel
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    model, schedule, optimizer, _ = small_run(model=Wrapper(three_layers()), steps=3, total=100)
    schedule.lr_scheduler.step()
    with monkeypatch.context() as patch:
        fail_at(patch, "between two merges", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            schedule.restart_if_due()
    state = {"schedule": schedule.state_dict(), "optimizer": optimizer.state_dict()}
    model, schedule, _, _ = small_run(model=model.module, steps=0, total=100, state=state)
    assert schedule.restart_if_due()
    assert [int(layer.merge_count) for layer in model] == [1, 1, 1]


def test_the_mark_of_another_course_is_not_believed():
    """A model loaded from an earlier state merges all layers, whatever mark a failed restart has left."""
    model, schedule, _, _ = small_run(model=three_layers(), steps=3, total=100)
    schedule.lr_scheduler.restarting = {str(i): 5 for i in range(3)}
    schedule.lr_scheduler.step()
    assert schedule.restart_if_due()
    assert [int(layer.merge_count) for layer in model] == [1, 1, 1]
    assert schedule.lr_scheduler.restarting is None


def test_deepspeed_is_refused_by_name():
    engine = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1"})()
    wrapped = type("AcceleratedOptimizer", (), {"optimizer": engine})()
    for optimizer in (engine, wrapped):
        with pytest.raises(TypeError, match="DeepSpeedZeroOptimizer.*fully_shard"):
            ReLoRaSchedule(three_layers(), optimizer, lambda t: 1.0, 4, 2)
