"""ReLoRA over a whole model: apply_relora, merge_and_reinit, merge_and_unload."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from relora_kernels import sharding
from relora_kernels.layer import FusedReLoRaLinear, merge_layers
from relora_kernels.ops import checks
from relora_kernels.ops.merge import check_finite

# The attention and MLP projections, by the path of the module (the ReLoRA paper's choice).
_DEFAULT_TARGETS = (
    r".*(attn|attention|mlp|ffn|feed_forward|densereludense|fc1|fc2"
    r"|layer\.\d+\.(intermediate|output)\.dense).*"
)
# What "all-linear" leaves at full rank beside the heads that a model names itself.
_HEADS = {"lm_head", "score", "classifier", "qa_outputs", "embed_out"}
# Path components that torch's and accelerate's wrappers add; A's draw must not depend on them.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


@dataclasses.dataclass
class ReLoRaConfig:
    """What apply_relora does. Names and meanings follow PEFT's LoraConfig where it has them.

    Attributes:
        r, lora_alpha, lora_dropout, use_rslora, lora_dtype, trainable_scaling: see FusedReLoRaLinear.
        target_modules: which nn.Linear modules: a list of names (a module matches whose path is the
            name or ends in "." + name), a regular expression (matched against the whole path),
            "all-linear" (every one but the output head), or None: attention and MLP projections.
        exclude_modules: a list of names or a regular expression of modules to leave alone.
        weight_dtype: dtype to store the frozen weights in, e.g. torch.bfloat16; None keeps theirs.
        merge_rounding: "nearest", "stochastic", "compensated"; None: compensated for 16-bit weights.
        seed: A's draws and stochastic rounding depend on (seed, module path, merge count) alone.

    Raises ValueError or TypeError on construction for values out of range.
    """

    r: int = 128
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_dtype: torch.dtype | None = None
    weight_dtype: torch.dtype | None = None
    trainable_scaling: bool = False
    merge_rounding: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        checks.lora_options(
            "ReLoRaConfig", self.r, self.lora_alpha, self.lora_dropout, self.merge_rounding, self.seed,
            {"lora_dtype": self.lora_dtype, "weight_dtype": self.weight_dtype},
        )  # fmt: skip
        for name in ("target_modules", "exclude_modules"):
            _check_pattern(name, getattr(self, name))


def apply_relora(model: nn.Module, config: ReLoRaConfig | None = None) -> nn.Module:
    """Swap the targeted nn.Linear modules of `model` for FusedReLoRaLinear, in place; returns `model`.

    Their weights are shared, not copied, and frozen; everything else (embeddings, norms, head, biases)
    stays as it is and trains at full rank. The config is kept as ``model.relora_config``. Make the
    optimizer afterwards, from the parameters that require grad.

    Raises ValueError if nothing is targeted (the message lists candidates), if the model holds
    FusedReLoRaLinear modules already, or if a targeted weight is shared with another module.
    """
    config = ReLoRaConfig() if config is None else config
    if not isinstance(model, nn.Module) or not isinstance(config, ReLoRaConfig):
        raise TypeError(
            f"apply_relora: expected an nn.Module and a ReLoRaConfig, got {type(model).__name__} and "
            f"{type(config).__name__}"
        )
    wrapped = [path for path, _ in relora_layers(model, required=False)]
    if wrapped:
        raise ValueError(
            f"apply_relora: expected a model without FusedReLoRaLinear modules, got {len(wrapped)} "
            f"({_some(wrapped)}); call merge_and_unload(model) first"
        )
    if isinstance(model, nn.Linear):
        raise ValueError(
            "apply_relora: expected a model that holds nn.Linear modules, got an nn.Linear itself; "
            "use FusedReLoRaLinear.from_linear"
        )
    targets = _targets(model, config)
    _refuse_unfit(model, targets)
    layers = {}
    trained = {path: linear.weight.requires_grad for path, linear in targets.items()}
    try:
        for path, linear in targets.items():
            layers[path] = FusedReLoRaLinear.from_linear(
                linear, config.r, config.lora_alpha, config.lora_dropout, config.use_rslora,
                config.lora_dtype, weight_dtype=config.weight_dtype,
                trainable_scaling=config.trainable_scaling, merge_rounding=config.merge_rounding,
                seed=config.seed, name=_plain_path(path),
            )  # fmt: skip
    except BaseException:  # out of memory, say: the model stays as it was
        for path, linear in targets.items():
            linear.weight.requires_grad_(trained[path])
        raise
    for path, layer in layers.items():
        _set_module(model, path, layer)
    model.relora_config = config
    return model


def relora_layers(model: nn.Module, required: bool = True) -> list[tuple[str, FusedReLoRaLinear]]:
    """(path, layer) of every FusedReLoRaLinear in `model`; ValueError if there is none."""
    layers = [(p, m) for p, m in model.named_modules() if isinstance(m, FusedReLoRaLinear)]
    if required and not layers:
        raise ValueError(
            f"expected a model with FusedReLoRaLinear modules, got {type(model).__name__} with none; "
            f"call apply_relora(model, config) first"
        )
    return layers


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """lora_A, lora_B and, where trained, lora_scaling of every layer: what an optimizer reset is for."""
    for _, layer in relora_layers(model):
        for parameter in (layer.lora_A, layer.lora_B, layer.lora_scaling):
            if parameter is not None:
                yield parameter


@torch.no_grad()
def merge_and_reinit(model: nn.Module) -> int:
    """Merge every FusedReLoRaLinear of `model` and restart its A and B; returns how many there are.

    Per layer: W <- round(W + s B A), then A drawn from (seed, name, merge_count), B zeroed. What the
    model computes stays the same up to the rounding of W. Reset the optimizer's moments and the
    learning rate at the same step (`ReLoRaSchedule` does all three).

    Parameters sharded by FSDP2's fully_shard are merged shard by shard, with the same result; call
    it on every rank then.

    Raises RuntimeError while gradients of A or B are pending, and FloatingPointError if any layer's
    update is not finite; nothing is changed then.
    """
    sharding.reshard(model)
    layers = relora_layers(model)
    for path, layer in layers:
        layer.name = layer.name or _plain_path(path)
    merge_layers([layer for _, layer in layers])
    return len(layers)


@torch.no_grad()
def merge_and_unload(model: nn.Module) -> nn.Module:
    """Replace every FusedReLoRaLinear by a plain trainable nn.Linear holding the merged weight.

    In place; returns `model` (the new nn.Linear, if `model` is itself one layer). W is rounded to
    nearest, residual included. Raises FloatingPointError, with nothing changed, if an update is not
    finite, and TypeError for a sharded model.
    """
    layers = relora_layers(model)
    check_finite([layer.update() for _, layer in layers])
    for path, layer in layers:
        if path == "":
            return layer.to_linear()
        _set_module(model, path, layer.to_linear())
    if hasattr(model, "relora_config"):
        del model.relora_config
    return model


def _targets(model: nn.Module, config: ReLoRaConfig) -> dict[str, nn.Linear]:
    linears = {path: m for path, m in model.named_modules() if type(m) is nn.Linear}
    heads = _output_heads(model)
    found = {path: m for path, m in linears.items() if _is_target(path, m in heads, config)}
    if found:
        return found
    conv1d = sum(type(m).__name__ == "Conv1D" for m in model.modules())
    raise ValueError(
        f"apply_relora: expected target_modules={config.target_modules!r} (exclude_modules="
        f"{config.exclude_modules!r}) to match nn.Linear modules, got none of {len(linears)}; "
        f"candidates: {_some(linears, 12) or 'none'}"
        + (f"; {conv1d} Conv1D modules are no nn.Linear: convert them first" if conv1d else "")
    )


def _is_target(path: str, is_head: bool, config: ReLoRaConfig) -> bool:
    if config.exclude_modules is not None and _matches(path, config.exclude_modules):
        return False
    if config.target_modules is None:
        return not is_head and re.fullmatch(_DEFAULT_TARGETS, path, re.IGNORECASE) is not None
    if config.target_modules == "all-linear":
        return not is_head and path.rpartition(".")[2] not in _HEADS
    return _matches(path, config.target_modules)


def _matches(path: str, pattern: str | Sequence[str]) -> bool:
    """PEFT's rule: a string is a regular expression of the whole path, a list holds name endings."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, path) is not None
    return any(path == name or path.endswith("." + name) for name in pattern)


def _check_pattern(name: str, pattern) -> None:
    if pattern is None or isinstance(pattern, str):
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(
                f"ReLoRaConfig: expected {name} to be a regular expression, got {pattern!r}: {error}"
            ) from error
    elif not isinstance(pattern, (list, tuple, set)) or not all(
        isinstance(n, str) for n in pattern
    ):
        raise TypeError(
            f"ReLoRaConfig: expected {name} to be a list of names, a regular expression or None, "
            f"got {pattern!r}"
        )


def _output_heads(model: nn.Module) -> set[nn.Module]:
    """Hugging Face models' output heads, which stay at full rank."""
    getters = (getattr(m, "get_output_embeddings", None) for m in model.modules())
    return {head for getter in getters if callable(getter) and (head := getter()) is not None}


def _refuse_unfit(model: nn.Module, targets: dict[str, nn.Linear]) -> None:
    """Targets that cannot be wrapped, before anything is changed."""
    owners: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(path)
    for path, linear in targets.items():
        if not isinstance(linear.weight, nn.Parameter):
            raise ValueError(
                f"apply_relora: expected {path}.weight to be a Parameter, got one that is computed "
                f"(weight_norm, pruning); remove that first or leave it out with exclude_modules"
            )
        names = owners[id(linear.weight)]
        if len(names) > 1:
            raise ValueError(
                f"apply_relora: expected targeted weights of their own, got one shared by "
                f"{', '.join(names)}; leave it out with exclude_modules or untie it"
            )
        checks.plain_tensors("apply_relora", **{f"{path}.weight": linear.weight})
        if isinstance(model.get_submodule(path.rpartition(".")[0]), nn.TransformerEncoderLayer):
            raise ValueError(
                f"apply_relora: expected targets whose forward is called, got {path} of an "
                f"nn.TransformerEncoderLayer, which in eval reads the weight past it; leave it out "
                f"with exclude_modules"
            )


def _plain_path(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def _set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _some(names, count: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
