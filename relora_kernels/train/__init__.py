"""Training with Hugging Face's Trainer: `ReLoRaCallback` for your own script, or `relora-train`.

`ReLoRaTrainer` is a Trainer whose checkpoints survive a kill and resume bit for bit.
"""

try:
    import accelerate  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"relora_kernels.train needs {error.name}: pip install 'relora_kernels[train]'"
    ) from error

from .callback import ReLoRaCallback, SkipNonFiniteCallback, StopOnSignalCallback
from .trainer import ReLoRaTrainer

__all__ = ["ReLoRaCallback", "ReLoRaTrainer", "SkipNonFiniteCallback", "StopOnSignalCallback"]
