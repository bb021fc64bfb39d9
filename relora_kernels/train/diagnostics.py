"""The effect of a restart: the size of the updates after it, and what survives a merge's rounding."""

import torch

from relora_kernels import sharding
from relora_kernels.model import lora_parameters, relora_layers

from .callback import ReLoRaCallback

UPDATES = 100  # steps after a restart whose updates are measured
LAYERS = 4  # layers measured at each merge; their weights are briefly held twice


class DiagnosticCallback(ReLoRaCallback):
    """ReLoRaCallback that also collects, for `take`:

    update        for each of the first 100 steps of a cycle: root mean square of (new - old) / lr over
                  all elements of A and B. Adam's usual scale is about 1. The first update from zeroed
                  moments with an old step count is 3.15.
    merge_kept    for each merge: the share of s B A that reached W, <W' - W, s B A> / |s B A|^2, where
                  W includes the residual; over a few layers spread over the model. 1 means all of it.

    Use it instead of ReLoRaCallback.
    """

    def __init__(self, schedule):
        super().__init__(schedule)
        self.values: dict[str, float] = {}
        self.old: list[torch.Tensor] | None = None

    def take(self) -> dict[str, float]:
        """What was measured since the last call."""
        values, self.values = self.values, {}
        return values

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self._step_of_cycle() < UPDATES:
            self.old = [sharding.local_rows(p)[0].clone() for p in self._factors()]

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        rate = self.schedule.lr_scheduler.get_last_lr()[0]
        if self.old is not None and rate > 0:
            new = [sharding.local_rows(p)[0] for p in self._factors()]
            total = sum((a - b).double().square().sum() for a, b in zip(new, self.old))
            count = sum(p.numel() for p in new)
            self.values["update"] = (total / count).sqrt().item() / rate
        self.old = None

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        scheduler = self.schedule.lr_scheduler
        due = scheduler.restarts_due(scheduler.last_epoch) > self.schedule.cycle
        layers = self._sample() if due else []
        before = [_exact_weight(layer) for layer in layers]
        updates = [
            layer.scaling * (layer.lora_B.double() @ layer.lora_A.double()) for layer in layers
        ]
        super().on_step_end(args, state, control, **kwargs)
        if layers:
            moved = [_exact_weight(layer) - w for layer, w in zip(layers, before)]
            kept = sum((m * u).sum() for m, u in zip(moved, updates))
            self.values["merge_kept"] = (kept / sum(u.square().sum() for u in updates)).item()

    def _step_of_cycle(self) -> int:
        scheduler = self.schedule.lr_scheduler
        return scheduler.last_epoch - self.schedule.cycle * scheduler.restart_every

    def _factors(self):
        return lora_parameters(self.schedule.model)

    def _sample(self):
        layers = [layer for _, layer in relora_layers(self.schedule.model)]
        if any(sharding.is_sharded(layer.weight) for layer in layers):
            return []  # each process holds only a part of each weight
        # If 4 divides the number of blocks, a stride of len // LAYERS always meets the same projection.
        return layers[:: max(1, (len(layers) - 1) // LAYERS)][:LAYERS]


def _exact_weight(layer) -> torch.Tensor:
    weight = layer.weight.detach().double().clone()
    return weight if layer.weight_residual is None else weight + layer.weight_residual.to(weight)
