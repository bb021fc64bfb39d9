"""Parameters and moments that FSDP2 has sharded (DTensor), as plain tensors.

Supported placement: rows (dimension 0) over one mesh dimension, as `fully_shard` does, and replicas.
"""

from __future__ import annotations

import torch


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor. Recognised by its mesh, so that torch.distributed need not be available."""
    return hasattr(tensor, "device_mesh")


def any_sharded(tensors) -> bool:
    return any([hasattr(t, "device_mesh") for t in tensors])


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, gathered from all ranks if it is sharded. A collective: call on every rank."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def row_dimension(tensor: torch.Tensor) -> int | None:
    """The mesh dimension over which `tensor` is sharded by rows; None for a plain or replicated tensor."""
    if not is_sharded(tensor):
        return None
    sharded = [dim for dim, p in enumerate(tensor.placements) if not p.is_replicate()]
    if len(sharded) > 1 or any(not tensor.placements[dim].is_shard(0) for dim in sharded):
        raise ValueError(
            f"expected a parameter sharded by rows over one mesh dimension, as "
            f"torch.distributed.fsdp.fully_shard does by default, got {tensor.placements}; shard it so"
        )
    return sharded[0] if sharded else None


def is_cut(tensor: torch.Tensor) -> bool:
    """Whether ranks hold different rows of `tensor`, or would if it had more rows."""
    dim = row_dimension(tensor)
    return dim is not None and tensor.device_mesh.size(dim) > 1


def local_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(a view of this rank's rows, the logical index of the first row)."""
    if not is_sharded(tensor):
        return tensor, 0
    dim, first = row_dimension(tensor), 0
    if dim is not None:
        rows_a_rank = -(-tensor.shape[0] // tensor.device_mesh.size(dim))  # torch.chunk's rule
        first = min(tensor.device_mesh.get_local_rank(dim) * rows_a_rank, tensor.shape[0])
    return tensor.to_local(), first


def like(parameter: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """`local`, this rank's rows, as a DTensor placed like `parameter`; `local` itself if that is not sharded.

    Checkpoints then gather and shard it as they do the parameter. A `local` that holds all rows, because it
    was made before the parameter was sharded, is cut first. Every rank must return a DTensor, even one whose
    shard is all rows: otherwise gathering would hang.
    """
    if not is_sharded(parameter):
        return local
    from torch.distributed.tensor import DTensor

    mesh, (rows, first) = parameter.device_mesh, local_rows(parameter)
    if len(local) != len(rows):
        local = local[first : first + len(rows)].clone()  # a view would keep all rows in memory
    return DTensor.from_local(
        local.to(mesh.device_type), mesh, parameter.placements,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


def reshard(model: torch.nn.Module) -> None:
    """Put FSDP2's parameters back into shards. After a forward pass a module may hold unsharded ones, and
    writes to those are lost."""
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()
