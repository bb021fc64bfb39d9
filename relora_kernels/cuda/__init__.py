"""CUDA backend: launchers around the compiled module `relora_kernels._C` (sources: csrc/).

The module is loaded on first use, never at import.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path

import torch

_REMEDY = "reinstall relora_kernels with RELORA_KERNELS_CUDA=on"


@functools.cache
def extension():
    """(module, None), or (None, why it is not available)."""
    try:
        return importlib.import_module("relora_kernels._C"), None
    except ModuleNotFoundError as error:
        if error.name != "relora_kernels._C":
            raise
        package = Path(__file__).parent.parent
        note = package / "_C.missing.txt"  # left by csrc/cuda_build.py
        if not note.exists() and (package.parent / "csrc").exists():
            return None, (
                f"the CUDA kernels are not built in {package.parent}, which holds the sources; `python -m` and "
                f"`torchrun -m` started there import these. After `pip install .` start them in another folder, "
                f"or use `pip install -e .`, which builds the kernels here"
            )
        reason = note.read_text().strip() if note.exists() else "no build was run"
        return None, f"the CUDA kernels are not built: {reason}; {_REMEDY}"
    except ImportError as error:
        return None, f"relora_kernels._C is built but does not load: {error}; {_REMEDY}"


def why_no_device(device: torch.device) -> str | None:
    """Why the compiled kernels cannot run on `device`; None if they can."""
    module, reason = extension()
    if module is None:
        return reason
    if device.type != "cuda":
        return f"expected tensors on a CUDA device, got {device}"
    return _why_no_gpu(device.index)


@functools.cache
def _why_no_gpu(index: int) -> str | None:
    module, _ = extension()
    driver, built = module.driver_version(), module.cudart_version
    if driver // 1000 < built // 1000:
        return (
            f"the kernels are built with CUDA {built // 1000}, and the driver supports CUDA up to "
            f"{driver // 1000}.{driver % 1000 // 10}; update the driver, or {_REMEDY} and an nvcc "
            f"of CUDA {driver // 1000}"
        )
    return why_no_arch(torch.cuda.get_device_capability(index), module.archs, module.ptx)


def why_no_arch(capability: tuple[int, int], archs: list[str], ptx: list[str]) -> str | None:
    """Why nothing that was built runs on this GPU; None if something does. Machine code runs on its own
    major version and its minor version or a later one ("90a": on 9.0 only), PTX on its version or any later
    one."""
    major, minor = capability
    for arch in archs:
        its_major, its_minor = divmod(int(arch.rstrip("af")), 10)
        if its_major == major and (its_minor == minor or its_minor < minor and arch.isdecimal()):
            return None
    if any(int(version) <= 10 * major + minor for version in ptx):
        return None
    return (
        f"the kernels are built for sm_{', sm_'.join(archs)}, and this GPU is sm_{major}{minor}; "
        f'{_REMEDY} and RELORA_KERNELS_ARCHS="{major}{minor}"'
    )
