"""The ops: each file has the schemas, checks, fakes, implementations and public functions of one op."""

import contextlib

import torch

# Raw ops are private (underscore names, no autograd): the public functions wrap them.
LIBRARY = torch.library.Library("relora_kernels", "DEF")


def no_autocast(device_type: str):
    """Disables autocast: implementations choose their dtypes; autocast would multiply float32 in 16 bits."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
