"""ReLoRA for PyTorch: layer, merge, optimizer reset and schedule. See README.md."""

from importlib.metadata import PackageNotFoundError, version

from relora_kernels.backend import BackendUnavailable, current_backend, use_backend
from relora_kernels.layer import FusedReLoRaLinear
from relora_kernels.model import (
    ReLoRaConfig,
    apply_relora,
    lora_parameters,
    merge_and_reinit,
    merge_and_unload,
)
from relora_kernels.ops.lora_linear import lora_linear
from relora_kernels.ops.merge import merge_
from relora_kernels.ops.prune import prune_
from relora_kernels.optimizer import reset_optimizer
from relora_kernels.schedule import JaggedLR, ReLoRaSchedule, cosine_with_warmup

try:
    __version__ = version("relora_kernels")
except PackageNotFoundError:  # run from the repository root, not installed
    __version__ = "0+unknown"

__all__ = [
    "BackendUnavailable",
    "FusedReLoRaLinear",
    "JaggedLR",
    "ReLoRaConfig",
    "ReLoRaSchedule",
    "apply_relora",
    "cosine_with_warmup",
    "current_backend",
    "lora_linear",
    "lora_parameters",
    "merge_",
    "merge_and_reinit",
    "merge_and_unload",
    "prune_",
    "reset_optimizer",
    "use_backend",
]
