"""The random-bit contract: known answers, and independence from how a tensor is cut."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relora_kernels.reference import philox


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's known-answer vectors for philox4x32, 10 rounds
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, words):
    as_tensors = tuple(torch.tensor([c]) for c in counter)
    assert tuple(int(w) for w in philox.philox4x32(as_tensors, key)) == words


@settings(deadline=None, max_examples=50)
@given(
    st.integers(-(2**63), 2**63 - 1), st.integers(0, 3), st.integers(0, 2**33),
    st.integers(0, 40), st.integers(1, 20), st.integers(1, 3),
)  # fmt: skip
def test_a_piece_draws_what_the_whole_draws(seed, stream, row, col, cols, rows):
    for bits in (philox.bits16, philox.bits32):
        whole = bits(seed, stream, (rows, col + cols), (row, 0))
        assert torch.equal(bits(seed, stream, (rows, cols), (row, col)), whole[:, col:])


def test_bits_follow_the_documented_layout():
    seed, row, col = 0x0123456789ABCDEF, 5, 19
    words = philox.philox4x32((col // 8, row, 2, 0), (seed & 0xFFFFFFFF, seed >> 32))
    word = words[col % 8 // 2]
    assert philox.bits16(seed, 2, (1, 1), (row, col)).item() == (
        word >> 16 if col % 2 else word & 0xFFFF
    )
    words = philox.philox4x32((col // 4, row, 2, 0), (seed & 0xFFFFFFFF, seed >> 32))
    assert philox.bits32(seed, 2, (1, 1), (row, col)).item() == words[col % 4]


def test_bits_are_uniform_and_streams_differ():
    draws = philox.bits16(1, 0, (256, 256))
    expected = 65536 / 16
    counts = torch.bincount((draws >> 12).flatten(), minlength=16).numpy()
    assert np.square(counts - expected).sum() / expected < 37.7  # chi square, 15 dof, p = .001
    assert (draws == philox.bits16(1, 1, (256, 256))).float().mean() < 1e-3
    assert (draws == philox.bits16(2, 0, (256, 256))).float().mean() < 1e-3


def test_uniform_is_sharding_independent_and_in_range():
    whole = philox.uniform_(torch.empty(7, 33), 0, 0.25, 3)
    shard = philox.uniform_(torch.empty(3, 33), 2, 0.25, 3)
    assert torch.equal(whole[2:5], shard)
    assert whole.min() >= -0.25 and whole.max() < 0.25 and whole.std() > 0.12
    assert torch.equal(whole.bfloat16(), philox.uniform_(torch.empty(7, 33).bfloat16(), 0, 0.25, 3))


def test_derived_seeds_are_stable_and_distinct():
    seeds = {philox.derive_seed(s, n, c) for s in range(4) for n in ("a", "b") for c in range(4)}
    assert len(seeds) == 32 and all(0 <= s < 2**63 for s in seeds)
    assert philox.derive_seed("A", 0, "model.layers.0", 1) == 6942214222939197457
