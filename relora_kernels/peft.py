"""Save and load LoRA factors in PEFT's `save_pretrained` layout, without needing PEFT.

    adapter_model.safetensors    base_model.model.<path>.lora_A.weight (r, in), lora_B.weight (out, r)
    adapter_config.json          peft_type "LORA", r, lora_alpha, target_modules, use_rslora, ...

A PEFT adapter is applied to a base model that it does not contain. ReLoRA changes that base: merges
change W, and unwrapped parameters train too. So `save_adapter` can write the base beside the adapter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

try:
    from safetensors.torch import load_file, save_file
except ImportError as error:
    raise ImportError("relora_kernels.peft needs safetensors: pip install safetensors") from error

from relora_kernels import files, sharding
from relora_kernels.layer import FusedReLoRaLinear
from relora_kernels.model import ReLoRaConfig, apply_relora, plain_path, relora_layers
from relora_kernels.ops import checks

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
# Entries of adapter_config.json that do not affect what the adapter computes. Any entry that is set, but is
# neither here nor in _READ, belongs to a variant of LoRA and is refused.
_NO_MATTER = {
    "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "task_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "modules_to_save", "bias", "megatron_core", "megatron_config",
    "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "ensure_weight_tying",
}  # fmt: skip
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "alpha_pattern"}
# The other initialisations change the base's weights.
_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


def save_adapter(
    model: nn.Module, folder: str | os.PathLike, base_folder: str | os.PathLike | None = None
) -> None:
    """Write the factors of `model` as a PEFT LoRA adapter into the new folder `folder`.

    ``PeftModel.from_pretrained(base, folder)`` then computes what `model` does, if `base` holds the
    present frozen weights. With `base_folder`, the model without its factors is written there: these
    weights and everything else that trains (by `save_pretrained` if the model has it, else as a state_dict
    in model.safetensors). The adapter's config then names that folder.

    Without `base_folder` the base must be the one that training started from: no merge yet, only lora_A,
    lora_B and lora_scaling train, and no adapter loaded into `model` has brought biases or
    modules_to_save.

    A trained scale is saved as the layer's lora_alpha. What compensated merges could not store in a 16-bit
    weight is added to a base that was made from float32 (``weight_dtype``). A base that is 16-bit itself
    loses it: keep a checkpoint of the model to go on training.

    PEFT (0.21) applies the names gate_proj, up_proj and down_proj to the experts in models whose experts
    transformers 5 keeps in one tensor (e.g. DeepSeek-V3). Only `load_adapter` reads such an adapter right.

    Each folder is written under another name and renamed when complete, the base first. With several
    processes, call this on one of them.

    Raises FileExistsError if either folder already exists, ValueError if the base would be lost, one folder
    lies in the other or `model` holds no FusedReLoRaLinear, TypeError for sharded parameters,
    FloatingPointError if a frozen weight leaves the range of the dtype that it goes back to; nothing is
    written then.
    """
    model = _unwrapped(model)
    sharding.reshard(model)
    layers = {plain_path(path): layer for path, layer in relora_layers(model)}
    if "" in layers:
        raise ValueError(
            "save_adapter: expected a model that holds FusedReLoRaLinear modules, got one itself"
        )
    for path, layer in layers.items():
        if sharding.is_sharded(layer.weight) or sharding.is_sharded(layer.lora_A):
            raise TypeError(
                f"save_adapter: expected unsharded parameters, got a DTensor in {path}; load the "
                f"full state_dict into an unsharded model and save that"
            )
    for target in filter(None, (folder, base_folder)):
        if Path(target).exists():
            raise FileExistsError(
                f"save_adapter: expected a new folder, got {target}, which exists"
            )
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    if base_folder is None:
        _refuse_to_lose_the_base(model, layers)
    else:
        paths = [Path(target).resolve() for target in (folder, base_folder)]
        if paths[0].is_relative_to(paths[1]) or paths[1].is_relative_to(paths[0]):
            raise ValueError(
                f"save_adapter: expected two folders beside each other, got {folder} and {base_folder}"
            )
        base = str(paths[1])
    weights = {
        f"{_PREFIX}{path}.{key}.weight": getattr(layer, key).detach().cpu().contiguous()
        for path, layer in layers.items()
        for key in ("lora_A", "lora_B")
    }
    config = json.dumps(_adapter_config(model, layers, base), indent=2, sort_keys=True) + "\n"
    with contextlib.ExitStack() as folders:  # exited in reverse order: no adapter without its base
        temporary = folders.enter_context(_new_folder(Path(folder)))
        _save_file(weights, temporary / _WEIGHTS)
        (temporary / _CONFIG).write_text(config, encoding="utf-8")
        if base_folder is not None:
            _save_base(model, layers, folders.enter_context(_new_folder(Path(base_folder))))


def load_adapter(
    model: nn.Module, folder: str | os.PathLike, config: ReLoRaConfig | None = None
) -> nn.Module:
    """apply_relora to `model`, the adapter's base, with the factors of the PEFT LoRA adapter in `folder`.

    The adapter determines which layers are wrapped, their ranks, scales and dropout; what PEFT does not have
    (dtypes, merge_rounding, seed) comes from `config`. Biases and modules_to_save in the adapter replace the
    model's. In place; returns `model`, which computes what PEFT's model does.

    Raises ValueError for an adapter that is not a plain LoRA of nn.Linear modules (DoRA, embeddings,
    Conv1D, ...; the message names the obstacle) or does not fit `model`, FileNotFoundError if one of the
    two files is missing, and whatever apply_relora raises; `model` is unchanged then.
    """
    folder = Path(folder)
    settings, weights = _read(folder)
    pairs, others = _sort(folder, weights)
    modules = {plain_path(path): (path, module) for path, module in model.named_modules()}
    for name, (lora_A, lora_B) in pairs.items():
        got = modules.get(name, (name, None))[1]
        if type(got) is not nn.Linear:
            if isinstance(got, FusedReLoRaLinear):
                break  # apply_relora's message says what to do
            _refuse(folder, f"nn.Linear modules of {type(model).__name__} as targets",
                    f"{name}, {'which it does not have' if got is None else 'a ' + type(got).__name__}")  # fmt: skip
        r, shape = lora_A.shape[0], tuple(got.weight.shape)
        if lora_A.shape != (r, shape[1]) or lora_B.shape != (shape[0], r) or r < 1:
            _refuse(folder, f"factors of {name}.weight {shape}",
                    f"{tuple(lora_A.shape)} and {tuple(lora_B.shape)}")  # fmt: skip
    parameters = _fitting_parameters(model, folder, others)

    alphas = {name: _alpha(settings, name) for name in pairs}
    ranks = {name: lora_A.shape[0] for name, (lora_A, _) in pairs.items()}
    config = dataclasses.replace(
        config or ReLoRaConfig(),
        r=settings["r"],
        lora_alpha=settings["lora_alpha"],
        lora_dropout=settings.get("lora_dropout", 0.0),
        use_rslora=bool(settings.get("use_rslora", False)),
        target_modules="|".join(re.escape(modules[name][0]) for name in pairs if name in modules),
        exclude_modules=None,
        trainable_scaling=False,
    )
    apply_relora(model, config)
    with torch.no_grad():
        for path, layer in relora_layers(model):
            name = plain_path(path)
            layer.r, layer.lora_alpha = ranks[name], alphas[name]
            for key, value in zip(("lora_A", "lora_B"), pairs[name]):
                like = getattr(layer, key)
                setattr(layer, key, nn.Parameter(value.to(like.device, like.dtype)))
        for name, parameter in parameters.items():
            parameter.copy_(others[name])
    # The base has other values for these: save_adapter checks.
    _unwrapped(model).relora_replaced = sorted(parameters)
    return model


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and torch.compile's wrapper."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def _refuse_to_lose_the_base(model, layers) -> None:
    merges = max(int(layer.merge_count) for layer in layers.values())
    factors = {id(getattr(layer, k)) for layer in layers.values()
               for k in ("lora_A", "lora_B", "lora_scaling")}  # fmt: skip
    trained = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in factors]
    replaced = getattr(model, "relora_replaced", [])
    if merges:
        got = f"{merges} merges into it, which the adapter does not hold"
    elif replaced:
        got = f"{len(replaced)} parameters that load_adapter replaced ({checks.some(replaced)})"
    elif trained:
        got = f"{len(trained)} other parameters that train ({trained[0]}, ...)"
    else:
        return
    as_in_base = ", or call requires_grad_(False) on what is as in the base"
    raise ValueError(
        f"save_adapter: expected the base to be the one that training started from, got {got}; give "
        f"base_folder to write the base too{'' if merges or replaced else as_in_base}"
    )


def _save_base(model, layers, folder: Path) -> None:
    """Save `model` without factors: each FusedReLoRaLinear becomes the nn.Linear of its frozen weight."""
    drop = {
        f"{path}.{key}"
        for path in layers
        for key in ("lora_A", "lora_B", "lora_scaling", "merge_count", "weight_residual")
    }
    state = {plain_path(k): v.detach() for k, v in model.state_dict().items()}
    state = {k: v for k, v in state.items() if k not in drop}
    for path, layer in layers.items():
        state[f"{path}.weight"] = layer.frozen_weight()
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder, state_dict=state)
        return
    seen: set[int] = set()
    for key, value in state.items():  # safetensors refuses tensors that share memory
        value = value.cpu().contiguous()
        shared = value.untyped_storage().data_ptr() in seen
        state[key] = value.clone() if shared else value
        seen.add(state[key].untyped_storage().data_ptr())
    _save_file(state, folder / "model.safetensors")


def _adapter_config(model, layers, base: str | None) -> dict:
    first = next(iter(layers.values()))
    rank, alpha = first.r, _saved_alpha(first)
    ranks = {p: m.r for p, m in layers.items() if m.r != rank}
    alphas = {p: a for p, m in layers.items() if (a := _saved_alpha(m)) != alpha}
    for path, layer in layers.items():
        if layer.use_rslora != first.use_rslora:
            raise ValueError(
                f"save_adapter: expected layers that all use rsLoRA or all do not, got use_rslora="
                f"{layer.use_rslora} in {path} and {first.use_rslora} before it; PEFT has one for all"
            )
    names = {path.rpartition(".")[2] for path in layers}
    ambiguous = any(
        plain_path(path) not in layers and path.rpartition(".")[2] in names
        for path, _ in model.named_modules()
    )
    generates = callable(getattr(model, "generate", None))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if generates and not _is_seq2seq(model) else None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": first.lora_dropout,
        "use_rslora": first.use_rslora,
        "target_modules": sorted(layers if ambiguous else names),
        "rank_pattern": {re.escape(path): r for path, r in ranks.items()},
        "alpha_pattern": {re.escape(path): a for path, a in alphas.items()},
        "bias": "none",
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _is_seq2seq(model) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _saved_alpha(layer: FusedReLoRaLinear) -> float:
    """The alpha that gives the present scale: PEFT has no trained one."""
    if layer.lora_scaling is None:
        return layer.lora_alpha
    return layer.scaling * (math.sqrt(layer.r) if layer.use_rslora else layer.r)


def _read(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            pickled = name == _WEIGHTS and (folder / "adapter_model.bin").is_file()
            hint = (
                "; adapter_model.bin is a pickle, which is not read: save the adapter anew with a "
                "present PEFT"
            )
            raise FileNotFoundError(
                f"load_adapter: expected {folder / name}, got none{hint if pickled else ''}"
            )
    settings = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        got = settings.get("peft_type") if isinstance(settings, dict) else type(settings).__name__
        _refuse(folder, 'peft_type "LORA"', got)
    for key, value in settings.items():
        if key == "init_lora_weights":
            known = value in _INITS
        else:
            known = key in _READ or key in _NO_MATTER or not value
        if not known:
            _refuse(folder, "a plain LoRA", f"{key} = {value!r}")
    for key in ("r", "lora_alpha"):
        if key not in settings:
            _refuse(folder, f"{key} in {_CONFIG}", "none")
    return settings, load_file(folder / _WEIGHTS)


def _sort(folder: Path, weights) -> tuple[dict[str, tuple], dict[str, torch.Tensor]]:
    """(path -> (A, B), name of a whole parameter -> its values)."""
    factors: dict[str, dict[str, torch.Tensor]] = {}
    others = {}
    for key, value in weights.items():
        if not key.startswith(_PREFIX):
            _refuse(folder, f"keys that begin with {_PREFIX}", key)
        name = key.removeprefix(_PREFIX)
        if match := re.fullmatch(r"(.+)\.(lora_[AB])\.weight", name):
            factors.setdefault(match[1], {})[match[2]] = value
        elif "lora_" in name:
            _refuse(folder, "a plain LoRA of nn.Linear modules", key)
        else:
            others[name.replace(".base_layer.", ".")] = value
    for name, pair in factors.items():
        if len(pair) < 2 or any(value.dim() != 2 for value in pair.values()):
            got = {k: tuple(v.shape) for k, v in pair.items()}
            _refuse(folder, f"matrices lora_A and lora_B of {name}", got)
    if not factors:
        _refuse(folder, "LoRA factors", f"none among {len(weights)} tensors")
    return {name: (pair["lora_A"], pair["lora_B"]) for name, pair in factors.items()}, others


def _fitting_parameters(model, folder: Path, others) -> dict[str, nn.Parameter]:
    """The parameters of `model` that the adapter replaces: biases and modules_to_save."""
    owners: dict[int, list[str]] = {}
    parameters = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(plain_path(name))
        parameters[plain_path(name)] = parameter
    for name, value in others.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != value.shape:
            shape = None if parameter is None else tuple(parameter.shape)
            _refuse(folder, f"parameters of {type(model).__name__}",
                    f"{name} {tuple(value.shape)} for {shape}")  # fmt: skip
        tied = set(owners[id(parameter)]) - others.keys()
        if tied:
            _refuse(folder, f"parameters of their own, as {name} is in it",
                    f"a model that ties it to {', '.join(sorted(tied))}")  # fmt: skip
    return {name: parameters[name] for name in others}


def _alpha(settings: dict, name: str) -> float:
    """PEFT's rule: the first pattern that matches the whole path or its end after a dot."""
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return alpha
    return settings["lora_alpha"]


def _refuse(folder: Path, expected: str, got) -> None:
    raise ValueError(
        f"load_adapter: {folder}: expected {expected}, got {got}; merge such an adapter with PEFT "
        f"(PeftModel.merge_and_unload) and start from the merged model"
    )


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `folder`, which is renamed to it when complete and on disk."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.unfinished-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        with files.disk_errors():
            yield temporary
            files.sync(*temporary.rglob("*"), temporary)
            temporary.rename(folder)  # fails if files have appeared there meanwhile
            files.sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
