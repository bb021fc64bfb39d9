"""The ops: each file declares one schema, its checks, fake and implementations, and the public function."""

import contextlib

import torch

# Raw ops are private (underscore names, no autograd): the public functions wrap them.
LIBRARY = torch.library.Library("relora_kernels", "DEF")


def no_autocast(device_type: str):
    """Implementations choose their dtypes; a caller's autocast would multiply float32 in 16 bits."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
