"""reset_optimizer: prune or zero Adam's moments of the LoRA parameters at a restart, in place."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch

from relora_kernels import ranks, sharding
from relora_kernels.ops import checks
from relora_kernels.ops.prune import prune_, prune_random_
from relora_kernels.reference import philox
from relora_kernels.sharded_prune import prune_sharded_

MODES = ("magnitude", "random", "zero")
MOMENTS = ("exp_avg", "exp_avg_sq")
# torch's optimizers that do not keep Adam's moments. They are refused by class, before their first step has
# made the state that would show it.
_OTHER_OPTIMIZERS = tuple(
    getattr(torch.optim, name)
    for name in "SGD ASGD RMSprop Rprop Adagrad Adadelta Adamax Adafactor LBFGS Muon".split()
    if hasattr(torch.optim, name)
)


@torch.no_grad()
def reset_optimizer(
    optimizer: torch.optim.Optimizer,
    params: Iterable[torch.nn.Parameter],
    mode: str = "magnitude",
    ratio: float = 0.9,
    paired: bool = True,
    reset_step: bool = False,
    seed: int | None = None,
) -> None:
    """Prune the Adam moments of `params` in place. The state of all other parameters is left alone.

    Args:
        optimizer: any optimizer whose state holds ``exp_avg`` and ``exp_avg_sq`` as floating tensors
            (Adam, AdamW, NAdam, ...; ``max_exp_avg_sq`` is treated as ``exp_avg_sq``).
        params: parameters of `optimizer`. Skipped are those without state yet, frozen ones that the
            optimizer does not hold, and those whose state ZeroRedundancyOptimizer keeps on another rank.
        mode: "magnitude" drops the share `ratio` of smallest |m| (see `prune_`); "random" drops each
            element with probability `ratio`; "zero" drops all.
        ratio: share to drop, 0 <= ratio <= 1; not used by "zero".
        paired: one mask for both moments, drawn from |exp_avg|. False prunes each moment by its own
            mask, as the ReLoRA authors' code does. Where that keeps m and drops v, the next updates are
            up to thousands of times the learning rate, which only a long learning-rate warm-up hides; a
            warning says so.
        reset_step: also set Adam's step count (and NAdam's mu_product) back to the start. Otherwise the
            first updates from zeroed moments are about three times the learning rate
            (0.1 / sqrt(0.001)).
        seed: for "random", whose masks depend on (seed, position in `params`, element) alone. None draws
            one from torch's generator; replicas of a model need the same seed on all ranks.

    Raises ValueError for parameters that are not the optimizer's or arguments out of range, TypeError
    (naming the optimizer and the state) for state other than floating Adam moments (8-bit codes, momentum
    buffers), and BackendUnavailable if a named backend cannot prune; nothing is changed then. Moments
    sharded by FSDP2 give the unsharded result; call this on every rank then.
    """
    checks.one_of("reset_optimizer", "mode", mode, MODES)
    ratio = checks.fraction("reset_optimizer", "ratio", ratio)
    if not isinstance(params, Iterable):
        raise TypeError(f"reset_optimizer: expected params to be parameters, got {params!r}")
    states = adam_states(optimizer, [params] if isinstance(params, torch.Tensor) else list(params))
    if mode == "random" and seed is None:
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
        if sharding.any_sharded(state[MOMENTS[0]] for _, state in states):
            seed = ranks.maximum([seed])[0]
    first, second = ([(i, state[key]) for i, state in states] for key in MOMENTS)
    key = "max_exp_avg_sq"
    largest = [(i, state[key]) for i, state in states if isinstance(state.get(key), torch.Tensor)]
    if mode == "zero":
        for _, moment in (*first, *second, *largest):
            moment.zero_()
    elif paired:
        _prune_paired(first, second, largest, mode, ratio, seed)
    else:
        _warn_independent(ratio)
        for group, moments in enumerate((first, second, largest)):
            _prune(moments, mode, ratio, (seed, group))
    if reset_step:
        for _, state in states:
            if torch.is_tensor(state.get("step")):
                state["step"].zero_()
            elif "step" in state:
                state["step"] = 0
            if torch.is_tensor(state.get("mu_product")):  # NAdam's momentum schedule
                state["mu_product"].fill_(1.0)


def _prune_paired(first, second, largest, mode, ratio, seed) -> None:
    # prune_ applies each mask to one partner only. So a third tensor (AMSGrad's) is pruned first, as the
    # partner of a copy of m, while m itself is still unchanged.
    if largest:
        by_index = dict(first)
        copies = [(i, by_index[i].clone()) for i, _ in largest]
        _prune(copies, mode, ratio, (seed, 0), [t for _, t in largest])
    _prune(first, mode, ratio, (seed, 0), [t for _, t in second])


def _prune(moments, mode, ratio, seed, paired_with=None) -> None:
    tensors = [t for _, t in moments]
    if mode == "magnitude":
        prune = prune_sharded_ if sharding.any_sharded(tensors) else prune_
        prune(tensors, ratio, paired_with)
        return
    seeds = [philox.derive_seed("prune", *seed, i) for i, _ in moments]
    local = [sharding.local_rows(t) for t in tensors]
    partners = [sharding.local_rows(t)[0] for t in paired_with or []]
    # A row of the whole tensor has as many elements as a row of the shard.
    first = [row * math.prod(t.shape[1:]) for t, (_, row) in zip(tensors, local)]
    prune_random_([rows for rows, _ in local], ratio, partners, seeds, first)


def adam_states(optimizer, params) -> list[tuple[int, dict]]:
    """(position in `params`, state) of each parameter that has state; raises as reset_optimizer does."""
    states = own_states(optimizer, params)
    inner = keeper(optimizer)
    for key in MOMENTS:
        moments = [state.get(key) for _, state in states]
        # Fast path for plain tensors: a model has hundreds.
        plain = {torch.Tensor}.issuperset(map(type, moments))
        if not (plain and set(checks.FLOATS).issuperset([t.dtype for t in moments])):
            for _, state in states:
                _refuse_other_state(inner, state, key)
    if type(inner) in _OTHER_OPTIMIZERS:
        _refuse(f"{type(inner).__name__}, which keeps others")
    return states


def own_states(optimizer, params) -> list[tuple[int, dict]]:
    """adam_states for any optimizer: raises only for parameters that it does not hold."""
    if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "state"):
        raise TypeError(f"reset_optimizer: expected a torch optimizer, got {optimizer!r}")
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    state_of, states = keeper(optimizer).state, []
    for i, p in enumerate(params):
        if id(p) not in known and p.requires_grad:
            raise ValueError(
                f"reset_optimizer: expected parameters of the optimizer, got params[{i}] "
                f"{checks.describe(p)} that it does not hold; pass lora_parameters(model) and make "
                f"the optimizer after apply_relora"
            )
        if state := state_of.get(p):
            states.append((i, state))
    return states


def keeper(optimizer):
    """The optimizer that holds the state: accelerate's wraps the user's optimizer, ZeroRedundancyOptimizer
    one for the parameters that this rank updates."""
    inner = getattr(optimizer, "optimizer", None)
    # Not wrappers with state of their own (Lookahead's slow weights): a merge would not update it.
    own = getattr(optimizer, "state", None)
    if isinstance(inner, torch.optim.Optimizer) and (not own or own is inner.state):
        return keeper(inner)
    inner = getattr(optimizer, "optim", None)
    return keeper(inner) if isinstance(inner, torch.optim.Optimizer) else optimizer


def _refuse_other_state(optimizer, state, key: str) -> None:
    moment = state.get(key)
    plain = type(moment) is torch.Tensor or sharding.is_sharded(moment)
    if plain and moment.dtype in checks.FLOATS:
        return
    got = f"no {key!r} (state: {', '.join(sorted(map(str, state)))})"
    if moment is not None:
        got = f"{key!r} as {type(moment).__name__} {checks.describe(moment)}"
    _refuse(f"{got} from {type(optimizer).__name__}")


def _refuse(got: str) -> None:
    raise TypeError(
        f"reset_optimizer: expected Adam moments exp_avg and exp_avg_sq as plain floating tensors, got "
        f"{got}; use a full-precision Adam such as torch.optim.AdamW, or ReLoRaSchedule's reset_mode=None"
    )


def _warn_independent(ratio: float) -> None:
    if 0.0 < ratio < 1.0:
        warnings.warn(
            "reset_optimizer(paired=False) prunes exp_avg and exp_avg_sq by independent masks: "
            "where exp_avg is kept and exp_avg_sq dropped the next updates are up to thousands of times the "
            "learning rate. Warm the learning rate up over 100 steps or more after it, or use paired=True",
            UserWarning,
            stacklevel=3,
        )
