"""Checkpoints that are either complete or absent, stored as safetensors and JSON only.

    checkpoint-N/
        model.safetensors      the whole model with W's residuals; sharded tensors are gathered
        config.json, ...       the model's configuration and the tokenizer
        training.safetensors   the optimizer's tensors, by parameter name
        training.json          the rest of the training state, with every rank's random generators
        trainer_state.json     Trainer's own state
        manifest.json          size and sha256 of every other file, and what a resumed run must match

A checkpoint is written under a temporary name, its files and folder are fsynced, and then it is
renamed. A process killed at any point leaves the earlier checkpoint intact. A checkpoint is valid if
every file matches the manifest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from relora_kernels import files, sharding

MANIFEST = "manifest.json"
_FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = re.compile(r"tmp-checkpoint-\d+(-old)?")

logger = logging.getLogger(__name__)


class OtherRun(ValueError):
    """The checkpoint belongs to a run with other settings."""


# --- folders ---------------------------------------------------------------------------------------


def write(folder: Path, fill: Callable[[Path], None], facts: dict) -> None:
    """Write a checkpoint to `folder`, all or nothing; `fill(temporary_folder)` writes its files.

    Raises what writing raises (OSError for a full disk). `folder` is then unchanged, and no other
    files are left behind.
    """
    temporary = folder.with_name(f"tmp-{folder.name}")
    old = folder.with_name(f"tmp-{folder.name}-old")
    _delete_unfinished(folder.parent)
    try:
        temporary.mkdir(parents=True)
        with files.disk_errors():
            fill(temporary)
        measured = {}
        for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
            measured[path.relative_to(temporary).as_posix()] = _measure(path)
        manifest = {"format": _FORMAT, "files": measured, "facts": facts}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        files.sync(*temporary.rglob("*"), temporary)
        if folder.exists():  # of the same step: damaged, or from an earlier run
            os.rename(folder, old)
        os.rename(temporary, folder)
        # The second, because the first checkpoint has created folder.parent.
        files.sync(folder.parent, folder.parent.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def delete_old(folder: Path, keep: int | None, spare: str | None = None) -> None:
    """Delete the checkpoints older than `folder`, except the newest `keep` - 1 and `spare`.

    `keep` None or less than 1 deletes nothing. Damaged checkpoints, judged by manifest and file sizes,
    don't count towards `keep`. Checkpoints newer than `folder`, from a course that the run has left,
    are never deleted.
    """
    if not keep or keep < 0:
        return
    older = [p for n, p in _numbered(folder.parent) if n < _number(folder)]
    kept = [p for p in older if problem(p, hashes=False) is None][: keep - 1]
    for path in older:
        if path not in kept and not (spare and path == Path(spare)):
            aside = path.with_name(f"tmp-{path.name}")
            os.rename(path, aside)  # if killed here, no half checkpoint remains
            shutil.rmtree(aside, ignore_errors=True)


def problem(folder: Path, hashes: bool = True) -> str | None:
    """Why a checkpoint is invalid, or None. Reads every file, unless `hashes` is False."""
    try:
        for name, (size, sha256) in read_manifest(folder)["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
            if hashes and _measure(path)[1] != sha256:
                return f"{name} has other contents than were written"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def read_manifest(folder: Path) -> dict:
    """The manifest. Raises ValueError if it is missing, damaged or of another format."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{MANIFEST} is missing: half-written, or not by ReLoRaTrainer")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] == _FORMAT and {"files", "facts"} <= manifest.keys():
            return manifest
        found = manifest["format"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} is damaged: {error!r}") from error
    raise ValueError(f"{MANIFEST}: expected format {_FORMAT}, got {found}")


def last_valid(folder: str | Path) -> Path | None:
    """The latest valid checkpoint-N in `folder`, or None. Logs why it skips each later one."""
    for _, path in _numbered(Path(folder)):
        found = problem(path)
        if found is None:
            return path
        logger.warning("passing over %s: %s", path, found)
    return None


def any_in(folder: str | Path) -> bool:
    """Whether there is a checkpoint-N, valid or not."""
    return bool(_numbered(Path(folder)))


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """(N, path) of every checkpoint-N, the latest first."""
    if not folder.is_dir():
        return []
    found = [(_number(p), p) for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, reverse=True)


def _number(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def _delete_unfinished(folder: Path) -> None:
    if folder.is_dir():
        for path in folder.iterdir():
            if _UNFINISHED.fullmatch(path.name):
                shutil.rmtree(path)


def _measure(path: Path) -> list:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return [path.stat().st_size, digest.hexdigest()]


# --- what a resumed run must match --------------------------------------------------------------------


def differences(saved: dict, now: dict, prefix: str = "") -> Iterator[str]:
    """Lines "name: expected (as saved) ..., got ..."."""
    for key in {**saved, **now}:
        a, b = saved.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif isinstance(a, list) and isinstance(b, list) and a != b:
            lost, new = ([x for x in one if x not in other] for one, other in ((a, b), (b, a)))
            parts = [f"expected also {_some(lost)}"] * bool(lost) + [
                f"got also {_some(new)}"
            ] * bool(new)
            yield f"{prefix}{key}: " + (", ".join(parts) or "expected another order")
        elif a != b:
            yield f"{prefix}{key}: expected {a}, got {b}"


def _some(items: list) -> str:
    return ", ".join(map(str, items[:3])) + (f" and {len(items) - 3} more" if items[3:] else "")


# --- tensors ---------------------------------------------------------------------------------------


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write safetensors. Strides may be any; aliases of one tensor (tied weights) are written once."""
    written, same, first, storages = {}, {}, {}, set()
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in first:
            same[name] = first[place]
            continue
        first[place] = name
        storage = tensor.untyped_storage().data_ptr()
        tensor = tensor.contiguous()
        if storage in storages and tensor.untyped_storage().data_ptr() == storage:
            tensor = tensor.clone()  # another view of a storage that is already written
        storages.add(storage)
        written[name] = tensor
    save_file(written, path, metadata={"format": "pt", "same": json.dumps(same)})


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        same = json.loads((file.metadata() or {}).get("same", "{}"))
    return tensors | {name: tensors[first] for name, first in same.items()}


def gather_model(model: torch.nn.Module, keep: bool = True) -> dict[str, torch.Tensor]:
    """The whole state_dict; sharded tensors are gathered one by one into host memory.

    Call it on every rank. Without `keep` the result is empty.
    """
    sharding.reshard(model)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if not torch.is_tensor(tensor):
            raise TypeError(
                f"{name}: expected a tensor in the state_dict, got {type(tensor).__name__}"
            )
        whole = sharding.whole(tensor.detach())
        if keep:
            tensors[name] = whole.cpu() if sharding.is_sharded(tensor) else whole
    return tensors


def load_model(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Load whole tensors into a model, sharded or not. OtherRun if names, shapes or dtypes differ."""
    sharding.reshard(model)
    own = model.state_dict()
    residuals = {name for name in {*own, *tensors} if name.endswith("weight_residual")}
    if wrong := (own.keys() ^ tensors.keys()) - residuals:
        raise OtherRun(
            f"expected the model to hold the checkpoint's tensors, got {len(wrong)} that only one of "
            f"them has: {_some(sorted(wrong))}"
        )
    placed = {}
    for name, tensor in tensors.items():
        target = own.get(name)
        if target is not None and (target.shape, target.dtype) != (tensor.shape, tensor.dtype):
            raise OtherRun(
                f"{name}: expected {tuple(tensor.shape)} {tensor.dtype} as in the checkpoint, got "
                f"{tuple(target.shape)} {target.dtype}"
            )
        placed[name] = tensor if name in residuals else place_like(target, tensor)
    model.load_state_dict(placed)


def place_like(target: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """This rank's rows of `whole` as a DTensor, if `target` is one of that shape; else `whole`."""
    return sharding.like(target, whole) if whole.shape == target.shape else whole


# --- trees of numbers and tensors ---------------------------------------------------------------------


def pack(tree, tensors: dict[str, torch.Tensor], path: str = ""):
    """`tree` in a form that JSON can hold; its tensors go into `tensors`, keyed by their paths.

    Takes dicts, lists, tuples, tensors, numpy's arrays and scalars, numbers, strings and None.
    Raises TypeError, naming the path, for anything else: nothing is pickled.
    """
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    if isinstance(tree, np.generic):
        return tree.item()
    if isinstance(tree, np.ndarray):
        return {"array": tree.tolist(), "dtype": str(tree.dtype)}
    if isinstance(tree, torch.Tensor):
        tensors[path] = tree
        return {"tensor": path}
    if isinstance(tree, (list, tuple)):
        kind = "list" if isinstance(tree, list) else "tuple"
        return {kind: [pack(item, tensors, f"{path}.{i}") for i, item in enumerate(tree)]}
    if isinstance(tree, dict):
        items = [[key, pack(value, tensors, f"{path}.{key}")] for key, value in tree.items()]
        if all(isinstance(key, (str, int, float, bool, type(None))) for key, _ in items):
            return {"dict": items}
    raise TypeError(
        f"checkpoint: expected numbers, strings, tensors, lists and dicts, got "
        f"{type(tree).__name__} at {path.strip('.') or 'the top'}"
    )


def unpack(tree, tensors: dict[str, torch.Tensor]):
    """The inverse of `pack`."""
    if not isinstance(tree, dict):
        return tree
    if "array" in tree:
        return np.array(tree["array"], dtype=tree["dtype"])
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "dict" in tree:
        return {key: unpack(value, tensors) for key, value in tree["dict"]}
    [(kind, items)] = tree.items()
    items = [unpack(item, tensors) for item in items]
    return items if kind == "list" else tuple(items)
