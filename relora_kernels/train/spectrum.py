"""The singular values of what ReLoRA added to the weights, compared with those of one LoRA cycle.

A cycle's update s B A has rank r. The sum of ReLoRA's cycles, W_end - W_start, is meant to have many
more directions. It is measured here layer by layer and shown per projection (q_proj, ...).
"""

import json
import logging
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback

from relora_kernels import ReLoRaSchedule, files, sharding
from relora_kernels.layer import FusedReLoRaLinear
from relora_kernels.model import plain_path, relora_layers

START, CYCLE, VALUES = "start.safetensors", "first_cycle.safetensors", "singular_values.json"

# The SVD of an (m, n) matrix costs about m n min(m, n) operations, times a constant. Two CPU cores do
# 2e9 of these a second, so this budget is about three minutes. It covers all layers up to the 350m
# preset and three of 24 blocks of the 1.3b one, and less than 1.5 GB of weights on disk.
_BUDGET = 4e11

logger = logging.getLogger(__name__)


class SpectrumCallback(TrainerCallback):
    """Saves to `folder` W at the start of ReLoRA, and s B and A at the end of its first cycle.

    Put it before ReLoRaCallback: it has to see the factors before a restart replaces them. Both files
    are written whole or not at all; a resumed run finds them, or writes the same again. A full disk
    costs only the plot, not the training.
    """

    def __init__(self, schedule: ReLoRaSchedule, folder: Path):
        self.schedule, self.folder = schedule, Path(folder)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self._keep(START, state, {"weight": _weight})

    def on_step_end(self, args, state, control, **kwargs):
        rate = self.schedule.lr_scheduler
        if self.schedule.cycle == 0 and rate.restarts_due(rate.last_epoch) > 0:
            self._keep(CYCLE, state, _FACTORS)

    def on_train_end(self, args, state, control, **kwargs):
        if self.schedule.cycle == 0:
            self._keep(CYCLE, state, _FACTORS)

    def _keep(self, name, state, parts):
        layers = relora_layers(self.schedule.model)
        writes = state.is_world_process_zero
        if not writes and not any(sharding.is_sharded(layer.weight) for _, layer in layers):
            return
        sharding.reshard(self.schedule.model)
        tensors = {
            f"{path}.{key}": part(layer)  # gathers sharded parameters, so on every process
            for path, layer in _measured(layers)
            for key, part in parts.items()
        }
        if not writes:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with files.disk_errors(), files.replacing(self.folder / name) as path:
                save_file(tensors, path, {"layers": str(len(layers))})
        except OSError as error:
            logger.warning("no plot of singular values, training goes on: %r", error)


def measure(model: nn.Module, folder: Path) -> dict | None:
    """Singular values of `model`'s weights minus those saved in `folder`, and of the first cycle.

    `model` may be merged (merge_and_unload) or still have its factors. Returns, and writes to VALUES:
    {"r": rank of a cycle, "layers": layers in the model, "measured": [{"layer": path, "projection":
    last part of it, "relora": [...], "cycle": [...]}, ...]}. Each list is descending, min(out, in)
    long, in fp32. Returns None if the run saved nothing (a full disk, a run begun without the
    callback) or the update holds NaN or inf, which is logged.
    """
    folder = Path(folder)
    if not (folder / START).exists() or not (folder / CYCLE).exists():
        return None
    modules = {plain_path(path): module for path, module in model.named_modules()}
    measured, r = [], 0
    with (
        safe_open(folder / START, "pt") as start,
        safe_open(folder / CYCLE, "pt") as cycle,
    ):
        layers = int(start.metadata()["layers"])
        kept = {key.removesuffix(".weight") for key in start.keys()}
        for path in (path for path in modules if path in kept):  # in the model's order
            module = modules[path]
            end = _float(module.weight)
            if isinstance(module, FusedReLoRaLinear):
                end = _weight(module) + _scaled_B(module) @ _float(module.lora_A)
            lora_B, lora_A = cycle.get_tensor(f"{path}.lora_B"), cycle.get_tensor(f"{path}.lora_A")
            r = lora_B.shape[1]
            # The r nonzero singular values of B A are those of R_B R_A^T, from B = Q_B R_B, A^T = Q_A R_A.
            small = torch.linalg.qr(lora_B)[1] @ torch.linalg.qr(lora_A.T)[1].T
            update = end - start.get_tensor(f"{path}.weight")
            if not (update.isfinite().all() and small.isfinite().all()):
                logger.warning("no plot of singular values: the update of %s is not finite", path)
                return None
            values = torch.zeros(min(end.shape))
            found = torch.linalg.svdvals(small)[: len(values)]
            values[: len(found)] = found
            measured.append(
                {
                    "layer": path,
                    "projection": path.rpartition(".")[2],
                    "relora": torch.linalg.svdvals(update.to(module.weight.device)).tolist(),
                    "cycle": values.tolist(),
                }
            )
    spectrum = {"r": r, "layers": layers, "measured": measured}
    files.write_text(folder / VALUES, json.dumps(spectrum) + "\n")
    return spectrum


def figures(spectrum: dict) -> dict[str, dict[str, dict[str, float]]]:
    """How many directions an update has: {projection: {"relora" or "cycle": figures}}.

    Each figure is summed over the measured layers: over_0.1, singular values above 0.1 (the ReLoRA
    paper's count); over_1_percent, above a hundredth of the layer's largest; entropy_rank, exp of the
    entropy of the singular values as shares of their sum (Roy and Vetterli, 2007); of, all of them.
    """
    table: dict = {}
    for row in spectrum["measured"]:
        for kind in ("relora", "cycle"):
            values = torch.tensor(row[kind], dtype=torch.float64)
            shares = values / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
            counts = {
                "over_0.1": int((values > 0.1).sum()),
                "over_1_percent": int((values > 0.01 * values[0]).sum()),
                "entropy_rank": float(torch.special.entr(shares).sum().exp()) if values[0] else 0.0,
                "of": len(values),
            }
            total = table.setdefault(row["projection"], {}).setdefault(
                kind, dict.fromkeys(counts, 0)
            )
            for name, count in counts.items():
                total[name] += count
    return table


def _measured(layers) -> list[tuple[str, FusedReLoRaLinear]]:
    """All layers, or as many of each projection as _BUDGET allows, evenly spread over the depth."""
    groups: dict[str, list] = {}
    cost = 0.0
    for path, layer in layers:
        groups.setdefault(path.rpartition(".")[2], []).append((plain_path(path), layer))
        cost += layer.in_features * layer.out_features * min(layer.in_features, layer.out_features)
    share = min(1.0, _BUDGET / cost) if cost else 1.0
    chosen = []
    for group in groups.values():
        count = max(1, int(share * len(group)))
        chosen += [group[round(i)] for i in torch.linspace(0, len(group) - 1, count).tolist()]
    return chosen


def _weight(layer: FusedReLoRaLinear) -> torch.Tensor:
    """W in float32 on the CPU, including the residual of compensated merges."""
    weight = _float(layer.weight)
    if layer.weight_residual is not None:
        weight += _float(sharding.like(layer.weight, layer.weight_residual))
    return weight


def _scaled_B(layer: FusedReLoRaLinear) -> torch.Tensor:
    return layer.scaling * _float(layer.lora_B)


_FACTORS = {"lora_B": _scaled_B, "lora_A": lambda layer: _float(layer.lora_A)}


def _float(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous float32 copy in host memory."""
    return torch.empty(tensor.shape).copy_(sharding.whole(tensor.detach()))
