"""ReLoRA over a whole model: apply_relora, merge_and_reinit, merge_and_unload."""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import warnings
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from relora_kernels import sharding
from relora_kernels.layer import FusedReLoRaLinear, merge_layers
from relora_kernels.ops import checks
from relora_kernels.ops.merge import check_finite

# The attention and MLP projections, by the path of the module (the ReLoRA paper's choice).
_DEFAULT_TARGETS = (
    r".*(attn|attention|mlp|ffn|feed_forward|densereludense|fc1|fc2"
    r"|layer\.\d+\.(intermediate|output)\.dense).*"
)
# Output heads that "all-linear" leaves at full rank, besides those that a model reports itself.
_HEADS = {"lm_head", "score", "classifier", "qa_outputs", "embed_out"}
# Path components that wrappers of torch and accelerate add. A's draw must not depend on them.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


@dataclasses.dataclass
class ReLoRaConfig:
    """Settings of apply_relora. Names and meanings follow PEFT's LoraConfig where it has them.

    Attributes:
        r, lora_alpha, lora_dropout, use_rslora, lora_dtype, trainable_scaling: see FusedReLoRaLinear.
        target_modules: which nn.Linear modules to wrap: a list of names (a module matches if its path is
            the name or ends in "." + name), a regular expression (matched against the whole path),
            "all-linear" (all but output heads), or None (attention and MLP projections).
        exclude_modules: a list of names or a regular expression of modules to leave alone.
        weight_dtype: dtype to store the frozen weights in, e.g. torch.bfloat16; None keeps their dtype.
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

    Their weights are shared, not copied. They are frozen and their gradients dropped. Everything else
    (embeddings, norms, head, biases) stays as it is and trains at full rank. Hooks on the targets, and
    buffers, submodules and attributes that the user added, move to the new layers. The config is kept as
    ``model.relora_config``. Make the optimizer afterwards, from the parameters that require grad.

    Raises ValueError, with nothing changed, if nothing is targeted (the message lists candidates), if
    the model already holds FusedReLoRaLinear modules, or if a target cannot be wrapped: its weight is
    shared with another module or computed (weight_norm, a parametrization), its forward is replaced or
    bypassed (nn.TransformerEncoderLayer), it has attributes of the user's under a name of FusedReLoRaLinear's, or
    it is in DistributedDataParallel. TypeError if a weight is no ordinary floating-point tensor.

    Functions that build a new nn.Linear from ``.weight`` (resize_token_embeddings if the output head is a
    target, fuse_linear_bn_eval) drop the factors: call `merge_and_unload` before them.
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
            f"({checks.some(wrapped)}); call merge_and_unload(model) first"
        )
    if isinstance(model, nn.Linear):
        raise ValueError(
            "apply_relora: expected a model that holds nn.Linear modules, got an nn.Linear itself; "
            "use FusedReLoRaLinear.from_linear"
        )
    targets = _targets(model, config)
    _refuse_unfit(model, targets)
    layers = {}
    before = [(m.weight, m.weight.requires_grad, m.weight.grad) for m in targets.values()]
    try:
        for path, linear in targets.items():
            layers[path] = FusedReLoRaLinear.from_linear(
                linear, config.r, config.lora_alpha, config.lora_dropout, config.use_rslora,
                config.lora_dtype, weight_dtype=config.weight_dtype,
                trainable_scaling=config.trainable_scaling, merge_rounding=config.merge_rounding,
                seed=config.seed, name=plain_path(path),
            )  # fmt: skip
    except BaseException:  # e.g. out of memory: leave the model as it was
        for weight, trained, gradient in before:
            weight.requires_grad_(trained).grad = gradient
        raise
    for path, layer in layers.items():
        take_over(layer, targets[path])
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
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
    """lora_A, lora_B and, if trained, lora_scaling of every layer: the parameters to reset at a restart.

    Raises ValueError for a model without FusedReLoRaLinear modules.
    """
    for _, layer in relora_layers(model):
        for parameter in (layer.lora_A, layer.lora_B, layer.lora_scaling):
            if parameter is not None:
                yield parameter


@torch.no_grad()
def merge_and_reinit(model: nn.Module) -> int:
    """Merge every FusedReLoRaLinear of `model` and restart its A and B; returns the number of layers.

    Per layer: W <- round(W + s B A), then A drawn from (seed, name, merge_count), B zeroed. What the
    model computes stays the same up to the rounding of W. Reset the optimizer's moments and the
    learning rate at the same step (`ReLoRaSchedule` does all three).

    Parameters sharded by FSDP2's fully_shard are merged shard by shard, with the same result. Call this on
    every rank then, with the model that fully_shard was called with.

    Raises RuntimeError while gradients of A or B are pending (except those that FSDP2 holds back under
    set_requires_gradient_sync(False)), ValueError for parametrized parameters, FloatingPointError if any
    layer's update is not finite, and BackendUnavailable if a named backend cannot merge a layer; nothing is
    changed then.
    """
    sharding.reshard(model)
    layers = relora_layers(model)
    for path, layer in layers:
        layer.name = layer.name or plain_path(path)
    merge_layers([layer for _, layer in layers])
    return len(layers)


@torch.no_grad()
def merge_and_unload(model: nn.Module) -> nn.Module:
    """Replace every FusedReLoRaLinear by a plain trainable nn.Linear holding the merged weight.

    In place; returns `model` (the new nn.Linear, if `model` is itself a layer). W, residual included, is
    rounded to nearest. What users have put on the layers moves as in apply_relora. Raises, with nothing
    changed, FloatingPointError if an update is not finite or a sum leaves its dtype's range (float16, or
    what `weight_dtype` had replaced), TypeError for a sharded model, ValueError for a layer whose forward is
    replaced and BackendUnavailable if a named backend cannot merge a layer.
    """
    sharding.reshard(model)
    layers = relora_layers(model)
    for path, layer in layers:
        layer.check_unload()
        _refuse_replaced("merge_and_unload", path, layer)
    recast = [layer for _, layer in layers if layer.unloaded_dtype != layer.weight.dtype]
    check_finite([layer.update_to_check() for _, layer in layers if layer not in recast])
    for layer in recast:
        layer.to_linear()  # tried one by one and dropped: all results at once may be more than there is memory for
    # A layer may be a child of several modules, or of one module under several names.
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {layer: [] for _, layer in layers}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child in places:
                places[child].append((parent, name))
    for layer, owners in places.items():
        linear = layer.to_linear()
        take_over(linear, layer)
        for parent, name in owners:
            setattr(parent, name, linear)
        if layer is model:
            return linear
    for name in ("relora_config", "relora_replaced"):
        if hasattr(model, name):
            delattr(model, name)
    return model


def take_over(new: nn.Module, old: nn.Module) -> None:
    """Move to `new` what users have put on `old`, the linear layer that it replaces: hooks, and parameters,
    buffers, submodules and attributes under names that neither class has.

    The dicts of hooks are shared, because the users' RemovableHandles refer to those very objects.
    """
    ours, (mine, theirs) = _own_names(), (vars(new), vars(old))
    for key, value in theirs.items():
        if "_hook" in key or key not in ours:
            mine[key] = value
    for kind in ("_parameters", "_buffers", "_modules"):
        mine[kind].update({k: v for k, v in theirs[kind].items() if k not in ours})
    mine["_non_persistent_buffers_set"] |= theirs["_non_persistent_buffers_set"] - ours
    for hook in new._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):  # it was bound to `old` when it was registered
            hook.module = weakref.ref(new)


@functools.cache
def _own_names() -> frozenset[str]:
    layer = FusedReLoRaLinear(1, 1, r=1, device="meta", trainable_scaling=True)
    return frozenset([*dir(layer), "parametrizations"])  # of factors: their result has been merged


@functools.cache
def _new_names() -> frozenset[str]:
    """Names that FusedReLoRaLinear has and nn.Linear has not."""
    return _own_names() - {*dir(nn.Linear(1, 1, device="meta")), "parametrizations"}


def _targets(model: nn.Module, config: ReLoRaConfig) -> dict[str, nn.Linear]:
    linears = {path: m for path, m in model.named_modules() if _plain_class(m) is nn.Linear}
    heads = _output_heads(model)
    found = {path: m for path, m in linears.items() if _is_target(path, m in heads, config)}
    if found:
        _warn_left_out(model, config, linears)
        return found
    others = [f"{len(paths)} {what}" for what, paths in _no_linears(model).items() if paths]
    raise ValueError(
        f"apply_relora: expected target_modules={config.target_modules!r} (exclude_modules="
        f"{config.exclude_modules!r}) to match nn.Linear modules, got none of {len(linears)}; "
        f"candidates: {checks.some(linears, 12) or 'none'}"
        + (f"; {', '.join(others)} are no nn.Linear: convert them first" if others else "")
    )


def _no_linears(model: nn.Module) -> dict[str, list[str]]:
    """{kind: paths} of modules that hold linear layers but are no plain nn.Linear that gets called."""
    conv1d, attentions, subclasses = [], [], []
    attention = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for path, m in model.named_modules():
        if type(m).__name__ == "Conv1D":
            conv1d.append(path)
        elif isinstance(m, nn.MultiheadAttention):
            attentions.append(path)
        elif isinstance(m, nn.Linear) and _plain_class(m) is not nn.Linear and m not in attention:
            subclasses.append(path)
    return {
        "Conv1D modules": conv1d,
        "nn.MultiheadAttention modules": attentions,
        "modules of nn.Linear's subclasses": subclasses,
    }


def _warn_left_out(model: nn.Module, config: ReLoRaConfig, linears: dict[str, nn.Linear]) -> None:
    """Warn about what the config seems to ask for but apply_relora does not wrap."""
    left, targets, exclude = [], config.target_modules, config.exclude_modules
    if exclude and not any(_matches(path, exclude) for path in linears):
        left.append(f"exclude_modules={exclude!r} matches no nn.Linear")
    if targets is None or targets == "all-linear":
        heads = _output_heads(model)
        heads = {path for path, m in model.named_modules() if m in heads}
        experts = [
            f"{path}.{name}" if path else name
            for path, m in model.named_modules()
            if not isinstance(m, nn.modules.conv._ConvNd)
            for name, p in m.named_parameters(recurse=False)
            if p.dim() == 3 and len(p) > 1
        ]
        for what, paths in {**_no_linears(model), "3-D parameters": experts}.items():
            paths = [path for path in paths if _is_target(path, path in heads, config)]
            if paths:
                left.append(f"{len(paths)} {what} stay at full rank ({checks.some(paths)})")
    elif not isinstance(targets, str):
        missing = [name for name in targets if not any(_matches(p, [name]) for p in linears)]
        if missing:
            left.append(f"of target_modules {', '.join(missing)} match no nn.Linear")
    if left:
        warnings.warn(f"apply_relora: {'; '.join(left)}", UserWarning, stacklevel=4)


def _is_target(path: str, is_head: bool, config: ReLoRaConfig) -> bool:
    if config.exclude_modules is not None and _matches(path, config.exclude_modules):
        return False
    if config.target_modules is None:
        return not is_head and re.fullmatch(_DEFAULT_TARGETS, path, re.IGNORECASE) is not None
    if config.target_modules == "all-linear":
        return not is_head and path.rpartition(".")[2] not in _HEADS
    return _matches(path, config.target_modules)


def _matches(path: str, pattern: str | Sequence[str]) -> bool:
    """PEFT's rule: a string is a regular expression for the whole path, a list holds name endings."""
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
    """The output heads of Hugging Face models, with what is in them (RoBERTa's classifier holds two linear
    layers). They stay at full rank."""
    heads = set()
    for m in model.modules():
        getter = getattr(m, "get_output_embeddings", None)
        if callable(getter):
            found = [getter(), *(getattr(m, name, None) for name in _HEADS)]
            heads |= {
                part for head in found if isinstance(head, nn.Module) for part in head.modules()
            }
    return heads


def _refuse_unfit(model: nn.Module, targets: dict[str, nn.Linear]) -> None:
    """Raise for targets that cannot be wrapped, before anything is changed."""
    owners: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(path)
    parallel = [m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
    waited_for = {m for ddp in parallel for m in ddp.modules()}
    for path, linear in targets.items():
        if linear in waited_for:
            raise ValueError(
                f"apply_relora: expected a model before DistributedDataParallel, which waits for the "
                f"gradients of the weights that it was made with, got {path} in one; apply first, then wrap"
            )
        for key in ("weight", "bias"):
            value = getattr(linear, key)
            if parametrize.is_parametrized(linear, key) or not (
                isinstance(value, nn.Parameter) or (key == "bias" and value is None)
            ):
                raise ValueError(
                    f"apply_relora: expected {path}.{key} to be a Parameter, got one that is computed "
                    f"(weight_norm, parametrization, pruning); remove that first or leave it out with "
                    f"exclude_modules"
                )
        _refuse_replaced("apply_relora", path, linear)
        names = owners[id(linear.weight)]
        if len(names) > 1:
            raise ValueError(
                f"apply_relora: expected targeted weights of their own, got one shared by "
                f"{', '.join(names)}; leave it out with exclude_modules or untie it"
            )
        checks.plain_tensors("apply_relora", **{f"{path}.weight": linear.weight})
        checks.no_subclass("apply_relora", **{f"{path}.weight": linear.weight})
        has = {*vars(linear), *linear._parameters, *linear._buffers, *linear._modules}
        if vars(linear).get("name") == plain_path(path):  # as the layer's own will be
            has.remove("name")
        if taken := sorted(has & _new_names()):
            raise ValueError(
                f"apply_relora: expected targets without attributes that FusedReLoRaLinear has, got {path} "
                f"with {', '.join(taken)}; rename or delete them"
            )
        if isinstance(model.get_submodule(path.rpartition(".")[0]), nn.TransformerEncoderLayer):
            raise ValueError(
                f"apply_relora: expected targets whose forward is called, got {path} of an "
                f"nn.TransformerEncoderLayer, which in eval reads the weight past it; leave it out "
                f"with exclude_modules"
            )


def _refuse_replaced(op: str, path: str, module: nn.Module) -> None:
    """Raise if a method is overridden on the instance: it is bound to the old module and would bypass the
    new one."""
    # The class's own method bound to the module is fine: accelerate leaves that when it removes its hooks.
    replaced = [
        key
        for key, value in vars(module).items()
        if callable(getattr(nn.Linear, key, None))
        and value != types.MethodType(getattr(type(module), key), module)
    ]
    if replaced:
        raise ValueError(
            f"{op}: expected modules with their class's methods, got {path or 'a layer'} whose "
            f"{', '.join(replaced)} is replaced (accelerate's hooks do that: "
            f"accelerate.hooks.remove_hook_from_module(model, recurse=True)); put it back first"
        )


def _plain_class(module: nn.Module) -> type:
    """The module's class, without the subclass that parametrizations create."""
    parametrized = parametrize.is_parametrized(module)
    return type(module).__bases__[0] if parametrized else type(module)


def plain_path(path: str) -> str:
    """`path` without the components that wrappers (DDP, torch.compile, FSDP, checkpointing) add."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)
