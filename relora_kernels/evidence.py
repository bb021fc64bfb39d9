"""Which backend `auto` takes first, by measurements made on this kind of device.

There are two sources. For a class of calls that both have, the second overrides the first:

    records   relora_kernels/records/*.json, shipped with the package, written by bench/gpu_check.py
    cache     ${RELORA_KERNELS_CACHE:-~/.cache/relora_kernels}/tune.json, written by
              `python -m relora_kernels tune`

Both hold entries {op, class, order, rows} for a device and the versions it was measured with. `order`
names the backends that matched fp64, fastest first. A class is a call's dtype and sizes, with the number
of tokens rounded up to a power of two. Without a record, `auto` keeps its default order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import os
import re
import tempfile
import warnings
from importlib import metadata
from pathlib import Path

import torch

from relora_kernels import cuda

FORMAT = 1
CACHE_VARIABLE = "RELORA_KERNELS_CACHE"
RECORDS = Path(__file__).parent / "records"
_DRIVER_FILE = Path("/proc/driver/nvidia/version")

# The fields in which a section must match the machine that reads it. For a record, neither the driver nor
# the build has to match: it is about the sources that it was shipped with.
_CACHE_MATCHES = (
    "device",
    "capability",
    "driver",
    "package",
    "torch",
    "triton",
    "kernels",
    "build",
)
_RECORD_MATCHES = ("device", "capability", "package", "kernels", "sources")


@dataclasses.dataclass
class Source:
    """One file that was read, and what it gave."""

    path: Path
    kind: str  # "record" or "cache"
    entries: list[dict] = dataclasses.field(default_factory=list)
    date: str = ""
    refused: str | None = None  # why it is ignored


# ---- The look-up of `auto` ------------------------------------------------------------------------

# Device index -> {(op, *class): backend names}. Filled at the first call on that device.
_tables: dict[int, dict[tuple, tuple[str, ...]]] = {}
_warned: set[Path] = set()


def order(op: str, args: tuple) -> tuple[str, ...]:
    """The backends on record for op(*args), fastest first; empty without a record.

    Costs a tenth of an op's own dispatch: no look-up on a CPU, the look-up of a small tuple on a GPU.
    """
    class_of = CLASSES.get(op)
    if class_of is None:
        return ()
    first = args[0]
    if isinstance(first, list):
        if not first:
            return ()
        first = first[0]
    if not first.is_cuda:
        return ()
    index = first.get_device()
    table = _tables.get(index)
    if table is None:
        table = _tables[index] = read_table(index)
    if not table:
        return ()
    return table.get((op, *class_of(*args)), ())


def read_table(index: int) -> dict[tuple, tuple[str, ...]]:
    """The table of one device. Warns once about an unusable cache. An unusable shipped record is shown
    only by `python -m relora_kernels`."""
    table = {}
    for source in sources(identity(torch.device("cuda", index))):
        if source.refused and source.kind == "cache" and source.path not in _warned:
            _warned.add(source.path)
            warnings.warn(
                f"relora_kernels: {source.path} is ignored: {source.refused}; "
                f"run `python -m relora_kernels tune` to write a new one",
                RuntimeWarning,
                stacklevel=2,
            )
        for entry in source.entries:
            table[(entry["op"], *entry["class"])] = tuple(entry["order"])
    return table


def forget() -> None:
    """Drop the tables, so that the next call reads the files again. For tests."""
    _tables.clear()
    _warned.clear()


def token_class(tokens: int) -> int:
    """Tokens up to 2^c share class c: 8193 to 16384 are 14."""
    return (tokens - 1).bit_length() if tokens > 0 else 0


def _linear_class(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed):
    return _linear(x, weight, lora_A, dropout_p)


def _linear_backward_class(dy, x, weight, lora_A, lora_B, p, scaling, dropout_p, *rest):
    return _linear(x, weight, lora_A, dropout_p)


def _linear(x, weight, lora_A, dropout_p):
    out_features, in_features = weight.shape
    return (
        DTYPE_NAMES[x.dtype], token_class(x.shape[0]), out_features, in_features, lora_A.shape[0],
        dropout_p > 0.0,
    )  # fmt: skip


def _merge_class(weight, lora_A, lora_B, scaling, rounding, *rest):
    out_features, in_features = weight.shape
    return (
        DTYPE_NAMES[weight.dtype], DTYPE_NAMES[lora_A.dtype], rounding, out_features, in_features,
        lora_A.shape[0],
    )  # fmt: skip


def _prune_class(tensors, ratio, paired_with):
    """The number of tensors and of elements, each rounded up to a power of two."""
    elements = sum([t.numel() for t in tensors])
    return (
        DTYPE_NAMES[tensors[0].dtype], bool(paired_with), token_class(len(tensors)), token_class(elements)
    )  # fmt: skip


# str(dtype) takes ten times as long as a look-up in a dict.
DTYPE_NAMES = {
    dtype: str(dtype).removeprefix("torch.")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}
# Op -> function from the op's arguments, as given to `backend.resolve`, to the class of the call.
CLASSES = {
    "lora_linear": _linear_class,
    "lora_linear backward": _linear_backward_class,
    "merge_": _merge_class,
    "prune_": _prune_class,
}


# ---- Devices and versions -------------------------------------------------------------------------


def identity(device: torch.device) -> dict[str, str]:
    """What a measurement depends on: device, driver, versions, and the kernels themselves."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name, capability = torch.cuda.get_device_name(device), f"sm_{major}{minor}"
    else:
        name = capability = device.type
    return {
        "device": name,
        "capability": capability,
        "driver": _driver() if device.type == "cuda" else "none",
        "package": _version("relora_kernels"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "kernels": _digest("_triton/*.py", "cuda/*.py", "reference/*.py"),
        "build": _digest("_C*.so"),
        "sources": _sources(),
    }


def _sources() -> str:
    """The digest of csrc/ that the CUDA kernels were built from; "none" if they are not built."""
    module, _ = cuda.extension()
    return "none" if module is None else module.sources


def _driver() -> str:
    """E.g. 580.65.06; if the kernel module's file is not visible, the CUDA version the driver supports."""
    if _DRIVER_FILE.exists():
        found = re.search(r"\s(\d+\.\d[\d.]*)\s", _DRIVER_FILE.read_text())
        if found:
            return found[1]
    return f"CUDA {torch._C._cuda_getDriverVersion()}"


@functools.cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


@functools.cache
def _digest(*patterns: str) -> str:
    """A digest of the package's files: what is on record is void once a kernel has changed."""
    digest, folder = hashlib.sha256(), Path(__file__).parent
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern))
    for path in paths:
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16] if paths else "none"


# ---- Files ----------------------------------------------------------------------------------------


def cache_path() -> Path:
    """Raises OSError if it would be in the home folder and the user has none, as in a container."""
    try:
        if os.environ.get(CACHE_VARIABLE):
            return Path(os.environ[CACHE_VARIABLE]).expanduser() / "tune.json"
        return Path.home() / ".cache" / "relora_kernels" / "tune.json"
    except RuntimeError as error:
        raise OSError(str(error)) from error


def sources(here: dict[str, str]) -> list[Source]:
    """The existing files as a machine with the identity `here` sees them; later ones override earlier ones.

    Shipped records of other devices are left out. Every other unusable file gives the reason in `refused`.
    """
    found = [Source(path, "record") for path in sorted(RECORDS.glob("*.json"))]
    with contextlib.suppress(OSError):  # no home folder: no cache
        if os.path.lexists(cache_path()):  # also False without permission to read the folder
            found.append(Source(cache_path(), "cache"))
    for source in found:
        try:
            section = _section(_read(source.path), here, source.kind)
            source.entries, source.date = section["entries"], section["date"]
        except (OSError, ValueError) as error:
            source.refused = str(error)
        except _OtherDevice as error:
            source.refused = str(error) if source.kind == "cache" else "another device's"
    return [s for s in found if s.refused != "another device's"]


class _OtherDevice(Exception):
    pass


def section_name(here: dict[str, str]) -> str:
    return f"{here['device']} {here['capability']}"


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"it is not of format {FORMAT}")
    if not isinstance(content.get("devices"), dict):
        raise ValueError("it has no table of devices")
    return content


def _section(content: dict, here: dict[str, str], kind: str) -> dict:
    section = content["devices"].get(section_name(here))
    if section is None:
        known = ", ".join(map(str, content["devices"])) or "no device"
        raise _OtherDevice(f"it is about {known}, and this is {section_name(here)}")
    made_with = section.get("identity") if isinstance(section, dict) else None
    if not isinstance(made_with, dict):
        raise ValueError("it does not say what it was made with")
    for name in _CACHE_MATCHES if kind == "cache" else _RECORD_MATCHES:
        if name == "sources" and here[name] == "none":
            continue  # no CUDA kernel can run here, so it does not matter which ones were measured
        if made_with.get(name) != here[name]:
            raise ValueError(
                f"it was made with {name} {made_with.get(name)!s:.60}, and this is {here[name]}"
            )
    entries = section.get("entries")
    if not isinstance(section.get("date"), str) or not isinstance(entries, list):
        raise ValueError("it has no date or no entries")
    for entry in entries:
        if not _is_entry(entry):
            raise ValueError(f"it has an entry that is none: {entry!r:.100}")
    return section


def _is_entry(entry) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("op"), str)
        and isinstance(entry.get("class"), list)
        and all(isinstance(part, (str, int)) for part in entry["class"])
        and isinstance(entry.get("order"), list)
        and all(isinstance(name, str) for name in entry["order"])
    )


def check_writable(path: Path) -> None:
    """Raises OSError if `write` would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path.parent).close()
    with contextlib.suppress(FileNotFoundError, ValueError):
        _read(path)


def write(path: Path, here: dict[str, str], entries: list[dict]) -> None:
    """Put `entries` into this device's section. They replace entries of the same class if the section was
    made with the same versions, else the whole section. Other devices' sections stay. A file of another
    format is kept as <name>.old. Raises OSError."""
    content = {"format": FORMAT, "devices": {}}
    try:
        content = _read(path)
    except FileNotFoundError:
        pass
    except ValueError:
        path.replace(path.with_name(path.name + ".old"))
    try:
        kept = _section(content, here, "cache")["entries"]
    except (ValueError, _OtherDevice):
        kept = []
    merged = {(e["op"], *e["class"]): e for e in [*kept, *entries]}
    content["devices"][section_name(here)] = {
        "identity": here,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "entries": list(merged.values()),
    }
    write_json(path, content)


def write_json(path: Path, content) -> None:
    """Write atomically: a reader sees either the whole old file or the whole new one. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            text = json.dumps(content, indent=1)
            # Lists of numbers go on one line: a model has hundreds of shapes. No string holds a newline.
            file.write(re.sub(r"\[\n[\d\s,]*\]", lambda m: " ".join(m[0].split()), text) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # with mkstemp's 0600 other users could not read an installed record
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
