"""Exchange a few integers between the processes of a run, by collectives on small tensors.

All functions but `count` and `index` are collectives of the default process group: call them on every rank.
Without a process group there is one rank, and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist


def count() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def index() -> int:
    return dist.get_rank() if count() > 1 else 0


def start_maximum(values: Sequence[int]) -> Callable[[], list[int]]:
    """Start one all-reduce. The returned function waits for it and returns each value's maximum.

    Waiting one step later costs a GPU nothing: by then the small all-reduce is long done.
    """
    if count() == 1:
        return lambda: list(values)
    tensor = torch.tensor(list(values), dtype=torch.int64, device=_device())
    work = dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True)

    def wait() -> list[int]:
        work.wait()
        return tensor.tolist()

    return wait


def maximum(values: Sequence[int]) -> list[int]:
    """Each value's maximum over all ranks; a broadcast, if the other ranks pass the least value."""
    return start_maximum(values)()


def gather(values: Sequence[int]) -> list[list[int]]:
    """Every rank's values, in rank order. All ranks pass equally many."""
    if count() == 1:
        return [list(values)]
    tensor = torch.tensor(list(values), dtype=torch.int64, device=_device())
    rows = [torch.empty_like(tensor) for _ in range(count())]
    dist.all_gather(rows, tensor)
    return torch.stack(rows).tolist()


def gather_bytes(data: bytes) -> list[bytes]:
    """Every rank's bytes, in rank order."""
    if count() == 1:
        return [data]
    sizes = [row[0] for row in gather([len(data)])]
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    padded = padded.to(_device())
    rows = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(rows, padded)
    return [row[:size].cpu().numpy().tobytes() for row, size in zip(rows, sizes)]


def _device() -> torch.device:
    """The CPU if the backend supports it, so that no GPU has to wait."""
    if "gloo" in str(dist.get_backend_config()):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
