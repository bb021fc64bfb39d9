"""The random-bit contract that every backend follows, in plain PyTorch.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). A draw is a
pure function of (seed, stream, row, column) of a logical element, so it does not depend on tile
shape, backend, sharding or world size:

    key     = (seed mod 2^32, seed div 2^32)            seed: int64, read as unsigned
    counter = (column div E, row, stream, 0)            E elements share one draw of four words
    E = 8   16 bits per element: word (column mod 8) div 2; its low half if column is even
    E = 4   32 bits per element: word (column mod 4)

Rows and column blocks are taken mod 2^32. `csrc/numerics.cuh` and `triton/philox.py` implement the same
contract for the kernels.
"""

from __future__ import annotations

import hashlib

import torch

STREAM_ROUND = 0  # stochastic rounding at a merge, 16 bits per element of W
STREAM_DROPOUT = 1  # dropout on the low-rank branch, 16 bits per element of x
STREAM_INIT = 2  # the draw of A, 32 bits per element
STREAM_PRUNE = 3  # random pruning, 32 bits per element of the flattened tensor (row 0)

_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # round multipliers
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # key increments
_U32 = 0xFFFFFFFF


def philox4x32(counter: tuple, key: tuple, rounds: int = 10) -> tuple:
    """Four words of Philox4x32. Words are int64 tensors (or ints) with values in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap mod 2^64, so the low and high words are those of the unsigned product.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _U32) ^ c1 ^ k0,
            p1 & _U32,
            ((p0 >> 32) & _U32) ^ c3 ^ k1,
            p0 & _U32,
        )
        k0, k1 = (k0 + _W0) & _U32, (k1 + _W1) & _U32
    return c0, c1, c2, c3


def _words(seed, stream: int, rows: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """(rows, blocks, 4) words as int64."""
    if not isinstance(seed, torch.Tensor):
        seed = torch.tensor(seed, dtype=torch.int64, device=rows.device)
    seed = seed.reshape(())
    key = (seed & _U32, (seed >> 32) & _U32)
    c0 = (blocks & _U32)[None, :].expand(len(rows), -1)
    c1 = (rows & _U32)[:, None].expand(-1, len(blocks))
    zero = torch.zeros((), dtype=torch.int64, device=rows.device)
    return torch.stack(philox4x32((c0, c1, zero + stream, zero), key), dim=-1)


def _span(start: int, count: int, device) -> torch.Tensor:
    return torch.arange(start, start + count, dtype=torch.int64, device=device)


def bits32(seed, stream: int, shape: tuple[int, int], start=(0, 0), device=None) -> torch.Tensor:
    """(rows, cols) int64 in [0, 2^32): 32 random bits for each element from `start` on."""
    first = start[1] // 4
    blocks = _span(first, -(-(start[1] + shape[1]) // 4) - first, device)
    flat = _words(seed, stream, _span(start[0], shape[0], device), blocks).flatten(1)
    offset = start[1] - 4 * first
    return flat[:, offset : offset + shape[1]]


def bits16(seed, stream: int, shape: tuple[int, int], start=(0, 0), device=None) -> torch.Tensor:
    """(rows, cols) int64 in [0, 2^16): 16 random bits for each element from `start` on."""
    first = start[1] // 8
    blocks = _span(first, -(-(start[1] + shape[1]) // 8) - first, device)
    words = _words(seed, stream, _span(start[0], shape[0], device), blocks)
    flat = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(1)
    offset = start[1] - 8 * first
    return flat[:, offset : offset + shape[1]]


def uniform_(tensor: torch.Tensor, start_row: int, bound: float, seed) -> torch.Tensor:
    """Fill a 2-D `tensor` with U(-bound, bound), keyed by logical element; returns it.

    Element = (n - 2^23) * fl32(bound * 2^-23) with n the upper 24 of its 32 bits: one rounding, so
    every backend gets the same float32. `start_row` is the logical row of tensor[0] (of a shard).
    """
    step = torch.tensor(bound * 2.0**-23, dtype=torch.float32).item()
    rows_at_once = max(1, 2**22 // max(1, tensor.shape[1]))
    for row in range(0, tensor.shape[0], rows_at_once):
        part = tensor[row : row + rows_at_once]
        n = bits32(seed, STREAM_INIT, tuple(part.shape), (start_row + row, 0), tensor.device) >> 8
        part.copy_((n - 2**23).to(torch.float32) * step)
    return tensor


def derive_seed(*parts) -> int:
    """A 63-bit seed from e.g. (seed, layer name, cycle): the same on every machine and rank."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
