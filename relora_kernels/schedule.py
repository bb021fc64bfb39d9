"""The jagged learning rate, and the object that decides when to merge, reset and restart."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from relora_kernels import ranks, sharding
from relora_kernels.model import lora_parameters, merge_and_reinit, plain_path, relora_layers
from relora_kernels.ops import checks
from relora_kernels.optimizer import MODES, adam_states, keeper, own_states, reset_optimizer
from relora_kernels.reference import philox

_SHORT_WARMUP = 50  # steps; with fewer, independent masks diverged (beta2 = 0.999)


def cosine_with_warmup(
    warmup_steps: int, total_steps: int, min_ratio: float = 0.1
) -> Callable[[int], float]:
    """Multiplier f(t): linear from 0 to 1 over warmup_steps, then half a cosine down to min_ratio.

    f(t) = t / w for t < w, else min + (1 - min) * (1 + cos(pi (t - w) / (T - w))) / 2 (ReLoRA,
    arXiv 2307.05695), and min from T on. Steps count optimizer updates.

    Raises ValueError unless 0 <= warmup_steps < total_steps and 0 <= min_ratio <= 1, TypeError if
    min_ratio is not a number.
    """
    for name, value in (("warmup_steps", warmup_steps), ("total_steps", total_steps)):
        checks.whole_number("cosine_with_warmup", name, value, 0)
    checks.fraction("cosine_with_warmup", "min_ratio", min_ratio)
    _require("cosine_with_warmup", warmup_steps < total_steps, "0 <= warmup_steps < total_steps",
             f"{warmup_steps} and {total_steps}")  # fmt: skip

    def multiplier(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
        return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return multiplier


class JaggedLR(LRScheduler):
    """A base schedule with a restart every `restart_every` steps (a "jagged" schedule).

    With P = restart_every, w = restart_warmup_steps, t the step and k = floor(t / P): if t >= P and
    t mod P < w the multiplier is (t mod P) / w * f(k P + w), else f(t) (ReLoRA, arXiv 2307.05695,
    section 3). With `anneal_steps` = a the rate also falls linearly towards 0 over the last a steps before
    a restart.

    Args:
        optimizer: the lr values of its param groups are the base rates.
        base_schedule: f, a function step -> multiplier, or a scheduler of torch or transformers that
            depends only on the step and changes only learning rates (cycle_momentum=False), made for
            `optimizer` and not stepped yet.
        restart_every, restart_warmup_steps, anneal_steps: steps; restart_warmup_steps + anneal_steps
            <= restart_every.
        total_steps: length of the run, if known. No restart happens at or after it, and a warm-up that it
            cuts off rises towards f of the last step instead of f(k P + w).

    Raises ValueError for other values, TypeError if `optimizer` is not an optimizer.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        base_schedule: Callable[[int], float] | LRScheduler,
        restart_every: int,
        restart_warmup_steps: int,
        *,
        anneal_steps: int = 0,
        total_steps: int | None = None,
    ) -> None:
        for name, value, least in (
            ("restart_every", restart_every, 1),
            ("restart_warmup_steps", restart_warmup_steps, 0),
            ("anneal_steps", anneal_steps, 0),
            ("total_steps", 1 if total_steps is None else total_steps, 1),
        ):
            checks.whole_number("JaggedLR", name, value, least)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"JaggedLR: expected a torch optimizer, got {optimizer!r}")
        _require("JaggedLR", restart_warmup_steps + anneal_steps <= restart_every,
                 f"restart_warmup_steps + anneal_steps <= restart_every = {restart_every}",
                 restart_warmup_steps + anneal_steps)  # fmt: skip
        groups = len(optimizer.param_groups)
        self.recorded = _Recorded(base_schedule) if isinstance(base_schedule, LRScheduler) else None
        if self.recorded is not None:
            self.base_schedules = [functools.partial(self.recorded, i) for i in range(groups)]
        elif callable(base_schedule):
            self.base_schedules = [base_schedule] * groups
        else:
            raise ValueError(
                f"JaggedLR: expected base_schedule to be a function step -> multiplier or an "
                f"LRScheduler, got {type(base_schedule).__name__}"
            )
        self.restart_every, self.restart_warmup_steps = restart_every, restart_warmup_steps
        self.anneal_steps = anneal_steps
        self.end = total_steps  # accelerate takes any scheduler with a total_steps for OneCycleLR
        # Set by ReLoRaSchedule; stored here to be saved with the step count. While a restart is unfinished,
        # `restarting` maps each layer to its merge count from before the restart; else it is None.
        self.restarts_done = 0
        self.restarting: dict[str, int] | None = None
        super().__init__(optimizer)

    def restarts_due(self, step: int) -> int:
        """The number of restarts at or before `step`: one at every multiple of restart_every."""
        if self.end is not None:
            step = min(step, self.end - 1)
        return step // self.restart_every

    def multiplier(self, step: int, base: Callable[[int], float] | None = None) -> float:
        """The factor on the base rate at `step`, by `base` (default: the first param group's schedule)."""
        base = base or self.base_schedules[0]
        start = self.restarts_due(step) * self.restart_every
        since = step - start
        if start > 0 and since < self.restart_warmup_steps:
            top = start + self.restart_warmup_steps
            if self.end is not None:  # beyond its end a base schedule may be negative or undefined
                top = min(top, self.end - 1)
            return since / self.restart_warmup_steps * base(top)
        left = start + self.restart_every - step
        if left <= self.anneal_steps and self.restarts_due(step + left) > self.restarts_due(step):
            return base(step) * left / (self.anneal_steps + 1)
        return base(step)

    def get_lr(self) -> list[float]:
        return [
            base_lr * self.multiplier(self.last_epoch, base)
            for base_lr, base in zip(self.base_lrs, self.base_schedules)
        ]

    def state_dict(self) -> dict:
        """Plain numbers. The schedules, which are functions, and total_steps come from the constructor."""
        left_out = ("base_schedules", "recorded", "end")
        state = {k: v for k, v in super().state_dict().items() if k not in left_out}
        return state | {"first_multipliers": self.recorded and self.recorded.first()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue from `state_dict`. The optimizer's own may be loaded before or after this, even before the
        schedules are made. Raises ValueError for another restart_every, restart_warmup_steps or
        anneal_steps; total_steps and the base schedule are not compared."""
        for key in ("restart_every", "restart_warmup_steps", "anneal_steps"):
            saved = state_dict.get(key)
            _require("JaggedLR.load_state_dict", saved == getattr(self, key),
                     f"{key} = {getattr(self, key)} as constructed", saved)  # fmt: skip
        groups, rates = self.optimizer.param_groups, self.get_last_lr()
        _require("JaggedLR.load_state_dict", len(state_dict["base_lrs"]) == len(groups),
                 f"{len(groups)} param groups", len(state_dict["base_lrs"]))  # fmt: skip
        state = dict(state_dict)
        first = state.pop("first_multipliers", None)
        super().load_state_dict(state)
        if first is not None and self.recorded is not None and first != self.recorded.first():
            self.recorded.walk_from(first)
        for group, before, rate in zip(groups, rates, self.get_lr(), strict=True):
            if float(group["lr"]) != float(before):
                continue  # loading the optimizer's state has set another rate since
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


class _Recorded:
    """A scheduler as a function of the step. A copy of it steps ahead on a stand-in optimizer."""

    def __init__(self, scheduler: LRScheduler) -> None:
        step = getattr(scheduler, "last_epoch", 0)
        fresh = not isinstance(scheduler, ReduceLROnPlateau) and step == 0
        _require("JaggedLR", fresh, "a base_schedule that follows the step alone, not stepped yet",
                 f"{type(scheduler).__name__} at step {step}")  # fmt: skip
        _require("JaggedLR", not _cycles_momentum(scheduler),
                 "a base_schedule that changes learning rates alone",
                 f"{type(scheduler).__name__} with cycle_momentum=True")  # fmt: skip
        self.scheduler = scheduler
        # OneCycleLR cannot step past its end, but a late restart's warm-up may end beyond it.
        self.last_step = (
            scheduler.total_steps - 1 if isinstance(scheduler, OneCycleLR) else math.inf
        )
        groups = scheduler.optimizer.param_groups
        self.initial = [float(group["initial_lr"]) for group in groups]
        self._walk([float(group["lr"]) for group in groups])

    def first(self) -> list[float]:
        """The multipliers at step 0."""
        return [self(i, 0) for i in range(len(self.initial))]

    def walk_from(self, first: list[float]) -> None:
        """Record again from step 0, with these multipliers at step 0. Needed if the optimizer's state was
        loaded before the scheduler was made: its rates were then those of a later step."""
        self._walk([multiplier * lr for multiplier, lr in zip(first, self.initial)])

    def _walk(self, rates: list[float]) -> None:
        groups = self.scheduler.optimizer.param_groups
        stand_in = torch.optim.Optimizer(
            [
                {**g, "params": [torch.zeros(1)], "lr": lr, "initial_lr": initial}
                for g, lr, initial in zip(groups, rates, self.initial)
            ],
            {},
        )
        self.ahead = copy.deepcopy(self.scheduler, {id(self.scheduler.optimizer): stand_in})
        self.rates = [rates]  # [step][param group]

    def __call__(self, group: int, step: int) -> float:
        step = min(step, self.last_step)
        with warnings.catch_warnings():
            # The stand-in is never stepped, which torch warns about.
            warnings.simplefilter("ignore")
            while len(self.rates) <= step:
                self.ahead.step()
                self.rates.append([float(g["lr"]) for g in self.ahead.optimizer.param_groups])
        return self.rates[step][group] / self.initial[group] if self.initial[group] else 0.0


def _cycles_momentum(scheduler: LRScheduler) -> bool:
    inner = getattr(scheduler, "_schedulers", ())  # of SequentialLR and ChainedScheduler
    return getattr(scheduler, "cycle_momentum", False) or any(map(_cycles_momentum, inner))


class ReLoRaSchedule:
    """Does merge, optimizer reset and learning-rate restart at the same step.

    In a plain loop::

        loss.backward(); optimizer.step(); optimizer.zero_grad(); schedule.step()

    With a trainer that steps schedulers itself, hand it `lr_scheduler` and call `restart_if_due`
    after each step (ReLoRaCallback does). Restarts follow lr_scheduler.last_epoch alone. A scheduler wrapped
    by accelerator.prepare steps once for every process, so its restarts come sooner.

    With torch.distributed, call it on every rank of the default group, all of which hold this model (DDP, or
    FSDP2's fully_shard). Each call sends a few integers, so that ranks that are at different steps, or whose
    factors or residuals differ for the same rows, raise an error instead of producing a wrong model. Ranks
    with fewer batches than others (DDP's Join) must call it as often as they.

    Running averages of the parameters (EMA, SWA) average W, A and B apart, which after a restart is no average
    of the models: begin them anew behind each restart, or average copies made by `merge_and_unload`.

    Args:
        model: holds FusedReLoRaLinear modules. optimizer: made after apply_relora.
        base_schedule, restart_every, restart_warmup_steps, anneal_steps, total_steps: see JaggedLR.
        reset_mode, reset_ratio, paired, reset_step: see `reset_optimizer` (mode, ratio, ...);
            reset_mode None leaves the moments alone, whatever they are.

    Raises ValueError if the optimizer does not hold all trained LoRA parameters or they are sharded otherwise
    than by rows. Raises TypeError if the optimizer is DeepSpeed's or does not keep Adam moments to reset; if
    its class does not show the latter, the error comes after its first step. Warns about independent masks
    with a restart warm-up under 50 steps, and at a restart if lora_B of a layer is still 0 (nothing has
    trained it) or the optimizer has no state.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        base_schedule: Callable[[int], float] | LRScheduler,
        restart_every: int,
        restart_warmup_steps: int,
        *,
        anneal_steps: int = 0,
        total_steps: int | None = None,
        reset_mode: str | None = "magnitude",
        reset_ratio: float = 0.9,
        paired: bool = True,
        reset_step: bool = False,
    ) -> None:
        checks.one_of("ReLoRaSchedule", "reset_mode", reset_mode, (None, *MODES))
        checks.fraction("ReLoRaSchedule", "reset_ratio", reset_ratio)
        if (
            reset_mode in ("magnitude", "random")
            and not paired
            and restart_warmup_steps < _SHORT_WARMUP
        ):
            warnings.warn(
                f"ReLoRaSchedule: independent masks (paired=False) with a restart warm-up of "
                f"{restart_warmup_steps} steps, under {_SHORT_WARMUP}, have been seen to blow up: "
                f"use paired=True or a longer restart_warmup_steps",
                UserWarning,
                stacklevel=2,
            )
        refuse_deepspeed("ReLoRaSchedule", model, optimizer)
        # Also checked before a merge: reset_optimizer would raise only after it.
        self._states = adam_states if reset_mode is not None else own_states
        sharding.reshard(model)
        self._states(optimizer, list(lora_parameters(model)))
        for _, layer in relora_layers(model):
            layer.check_placement()
        self.seed = relora_layers(model)[0][1].seed
        self._place = None  # the pending answer of the ranks' last comparison of step and restart
        # Whether the optimizer's state of the factors, made by their first step, has been checked.
        self._seen = reset_mode is None
        self.model, self.optimizer = model, optimizer
        self.reset_mode, self.reset_ratio = reset_mode, reset_ratio
        self.paired, self.reset_step = paired, reset_step
        self.lr_scheduler = JaggedLR(
            optimizer,
            base_schedule,
            restart_every,
            restart_warmup_steps,
            anneal_steps=anneal_steps,
            total_steps=total_steps,
        )

    @property
    def cycle(self) -> int:
        """The number of restarts done so far."""
        return self.lr_scheduler.restarts_done

    def step(self) -> bool:
        """After optimizer.step() and zero_grad(): step the learning rate, and restart if due.

        True if it restarted. Raises as `restart_if_due` does.
        """
        self.lr_scheduler.step()
        return self.restart_if_due()

    def restart_if_due(self) -> bool:
        """Merge, draw A anew and reset the moments if the learning rate has reached a restart.

        True if it restarted. Raises as merge_and_reinit and reset_optimizer do (the latter's errors about
        the state as soon as the optimizer has made it), and RuntimeError if ranks disagree. After an error
        or interrupt the restart stays due, and the next call does the rest of it: no layer is merged twice.
        `state_dict` keeps that across a resume.
        """
        scheduler = self.lr_scheduler
        due = scheduler.restarts_due(scheduler.last_epoch)
        self._compare_places(due)
        if due <= self.cycle and (self._seen or not keeper(self.optimizer).state):
            return False
        sharding.reshard(self.model)
        params = list(lora_parameters(self.model))
        self._seen = bool(self._states(self.optimizer, params)) or self._seen
        if due <= self.cycle:
            return False
        self._merge()
        if self.reset_mode is not None:
            # A repeat after an interrupt is harmless: pruning what is already pruned changes nothing.
            reset_optimizer(
                self.optimizer,
                params,
                self.reset_mode,
                self.reset_ratio,
                self.paired,
                self.reset_step,
                seed=philox.derive_seed(self.seed, "reset", due),
            )
        scheduler.restarts_done, scheduler.restarting = due, None
        return True

    def _merge(self) -> None:
        """Merge every layer that this restart has not merged yet."""
        layers, scheduler = dict(relora_layers(self.model)), self.lr_scheduler
        plain = {plain_path(path): layer for path, layer in layers.items()}
        if len(plain) == len(layers):
            layers = plain  # a resumed run may use other wrappers
        counts = {path: int(layer.merge_count) for path, layer in layers.items()}
        before = scheduler.restarting or {}
        merged = {path for path in counts if counts[path] == before.get(path, -2) + 1}
        untouched = {path for path in counts if counts[path] == before.get(path)}
        if not merged or len(merged) + len(untouched) < len(counts):
            self._compare_factors(layers)
            _warn_untrained(layers)
            if self.reset_mode is not None and not keeper(self.optimizer).state:
                warnings.warn(
                    f"ReLoRaSchedule: a restart finds no state in {type(self.optimizer).__name__}, so no "
                    f"moments are reset: none has been made yet, or another optimizer within it keeps them",
                    UserWarning,
                    stacklevel=2,
                )
            scheduler.restarting = counts  # nothing merged yet, or a stale record
            merge_and_reinit(self.model)  # refuses before it changes anything
            return
        for path in untouched:
            layers[path].merge()

    def _compare_places(self, due: int) -> None:
        """RuntimeError if ranks are at different steps or restarts.

        The answer of one call is read at the next, so that no GPU waits. Before a restart, and at the first
        call, it is read at once: a rank that is early then raises instead of waiting for the others in the
        merge.
        """
        if ranks.count() == 1:
            return
        place = (self.lr_scheduler.last_epoch, self.cycle, due)
        last, self._place = self._place, ranks.start_maximum([*place, *(-x for x in place)])
        answers = [last] if last else []
        if due > self.cycle or not last:
            answers.append(self._place)
        for answer in answers:
            values = answer()
            for name, most, least in zip(
                ("step", "restarts done", "restarts due"), values, values[3:]
            ):
                if most != -least:
                    raise RuntimeError(
                        f"ReLoRaSchedule: expected all ranks at one {name}, got {-least} to {most} "
                        f"(rank {ranks.index()} is at step {place[0]}): step the schedule on every "
                        f"rank alike, and resume all ranks from one checkpoint"
                    )

    def _compare_factors(self, layers: dict) -> None:
        """RuntimeError if ranks differ in factors, residuals, or what A's next draw depends on."""
        if ranks.count() == 1:
            return
        keys, found = [], []  # for each key two numbers: its first row, and its digest
        for path, layer in layers.items():
            for key, first, digest in _digests(layer):
                keys.append(f"{path}: {key}")
                found += [first, digest]
        most, least = ranks.maximum([len(keys), -len(keys)])
        if most != -least:
            raise RuntimeError(
                f"ReLoRaSchedule: expected the same layers on all ranks, got {len(layers)} on rank "
                f"{ranks.index()} and other numbers elsewhere; nothing was merged"
            )
        table = torch.tensor(ranks.gather(found)).view(ranks.count(), len(keys), 2).tolist()
        for key, values in zip(keys, zip(*table)):
            of_first: dict[int, tuple[int, int]] = {}  # first row -> (a rank, its digest)
            for rank, (first, digest) in enumerate(values):
                before, expected = of_first.setdefault(first, (rank, digest))
                if digest != expected:
                    others = [i for i, value in enumerate(values) if value == [first, digest]]
                    raise RuntimeError(
                        f"ReLoRaSchedule: expected the same factors on all ranks, got another {key} on "
                        f"ranks {others} than on rank {before}; nothing was merged. Give all ranks one "
                        f"seed, load checkpoints on all of them, and train in DistributedDataParallel or "
                        f"fully_shard"
                    )

    def state_dict(self) -> dict:
        """Plain numbers: step, restarts done, learning rates, and merge counts during a restart."""
        return self.lr_scheduler.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        self.lr_scheduler.load_state_dict(state_dict)


def refuse_deepspeed(where: str, *objects) -> None:
    """TypeError for DeepSpeed's engines and optimizers, also inside Accelerate's wrappers."""
    for thing in objects:
        while thing is not None:
            if type(thing).__module__.partition(".")[0] == "deepspeed":
                raise TypeError(
                    f"{where}: expected a torch optimizer and model, got DeepSpeed's "
                    f"{type(thing).__name__}, whose flat copies of the parameters a merge cannot "
                    f"reach; use DistributedDataParallel, or torch.distributed.fsdp.fully_shard "
                    f"(relora-train --sharding full)"
                )
            thing = getattr(thing, "optimizer", None)


def _warn_untrained(layers: dict) -> None:
    """Looks at this rank's rows of B only: a warning is not worth a collective."""
    rows = {
        path: sharding.local_rows(layer.lora_B.detach())[0]
        for path, layer in layers.items()
        if layer.lora_B.requires_grad
    }
    untrained = [path for path, B in rows.items() if B.numel() > 0 and not B.any()]
    if untrained:
        warnings.warn(
            f"ReLoRaSchedule: {len(untrained)} of {len(layers)} layers come to a restart with lora_B = 0 "
            f"({checks.some(untrained)}): nothing has trained "
            f"them. A model that reads .weight instead of calling its module needs that left out with "
            f"exclude_modules",
            UserWarning,
            stacklevel=2,
        )


def _digests(layer):
    """(name, first row, digest) of all that must agree between ranks that hold the same rows."""
    draw = philox.derive_seed(layer.seed, layer.name, int(layer.merge_count))
    yield "seed, name or merge count", 0, draw % 2**62
    for key in ("lora_A", "lora_B"):
        rows, first = sharding.local_rows(getattr(layer, key).detach())
        yield key, first, _bits(rows)
    # The residual is neither parameter nor buffer, so DDP and broadcast_from_rank0 do not send it.
    residual, (weight, first) = layer.weight_residual, sharding.local_rows(layer.weight.detach())
    if residual is not None and len(residual) != len(weight):  # made before W was sharded
        residual = residual[first : first + len(weight)]
    yield "weight_residual", first, 0 if residual is None else _bits(residual)
    if sharding.is_sharded(layer.weight):  # either all ranks have loaded one or none has
        yield "weight_residual", 0, int(layer.residual_loaded)


def _bits(tensor: torch.Tensor) -> int:
    """The sum of a tensor's bytes, read as int64s: equal for equal tensors, also with NaN."""
    content = tensor.detach().reshape(-1).view(torch.uint8)
    if content.storage_offset() % 8:
        content = content.clone()
    whole = content.numel() // 8 * 8
    return int(content[:whole].view(torch.int64).sum() + content[whole:].sum())


def _require(where: str, condition: bool, expected: str, got) -> None:
    if not condition:
        raise ValueError(f"{where}: expected {expected}, got {got}")
