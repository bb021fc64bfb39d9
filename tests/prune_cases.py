"""Shared by the tests of csrc/prune.cu: kernels on the CPU in place of the extension, and the tensors to prune."""

import ctypes
import itertools
import mmap
import os

import numpy as np
import torch
from simt_build import assert_same_bits

from relora_kernels.cuda import prune as launcher
from relora_kernels.reference import prune as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # launch.h's order
SPAN = 49152  # kSmall: up to this size one block does it all, above it several blocks
SWEEP = 8192  # kSweep of 32 bits: elements that a block reads at a time
RATIOS = [0.0, 0.5, 0.9, 0.99, 0.999, 1.0]
SMALL = [1, 2, 31, 33, 1000, 4096, 8193]
EDGES = [SPAN - 1, SPAN, SPAN + 1, 2 * SPAN, 2 * SPAN + 4099]
GUARDED_SIZES = [1, 5003, SPAN + 1, 2 * SPAN + 4099, 3 * SPAN - 8000, 4 * SPAN]
# 24 layers of hidden 2048, ffn 5461 at r = 128: the 1.3B model's lora_A and lora_B.
LORA_1B = [s * 128 for s in ([2048] * 8 + [2048, 5461] * 3) * 24]
GARBAGE = 0xA5


class Shim:
    """Stands in for relora_kernels._C: the same kernels, on the CPU. It gives them a workspace full of garbage
    and checks that they do not write behind it."""

    def __init__(self, library):
        self.library, self.order, self.blocks, self.bytes = library, 0, 0, 0
        self.cluster = 0  # blocks of the largest cluster; 0: none, as on GPUs before Hopper
        self.multiprocessors = None  # None: from the order; the fewer, the more spans per block
        library.simt_prune_workspace.restype = ctypes.c_int64
        library.simt_prune_settled.restype = ctypes.c_bool

    def prune_workspace(self, rows, device=0):
        self._be_a_device()
        self.bytes = self.library.simt_prune_workspace(*self._list(rows))
        return self.bytes + 256

    def prune(self, rows, ratio, float_ranks, workspace, bytes_, device, stream):
        assert bytes_ == self.bytes + 256
        ctypes.memset(workspace, GARBAGE, bytes_)
        rank_rule = ctypes.c_double(ratio), ctypes.c_int64(float_ranks)
        needed = ctypes.c_int64(self.bytes)
        self._call("prune", rows, *rank_rule, ctypes.c_void_p(workspace), needed)
        self.window = (ctypes.c_uint32 * 2)()
        self.settled = self.bytes > 0 and self.library.simt_prune_settled(
            ctypes.c_void_p(workspace), self.window
        )
        assert ctypes.string_at(workspace + self.bytes, 256) == bytes([GARBAGE]) * 256

    def prune_random(self, rows, threshold, device, stream):
        self._call("prune_random", rows, ctypes.c_uint64(threshold))

    def magnitude_counts(self, rows, prefixes, shift, bits, *rest):
        counts, lowest, highest, device, stream = rest
        outputs = map(ctypes.c_void_p, (counts, lowest, highest))
        self._call("magnitude_counts", rows, ctypes.c_void_p(prefixes), shift, bits, *outputs)

    @staticmethod
    def _list(rows):
        return ctypes.c_void_p(rows.buffer_info()[0]), ctypes.c_int64(len(rows) // 7)

    def _be_a_device(self):
        multiprocessors = self.multiprocessors or 1 + 2 * (self.order % 3)
        self.library.simt_device(multiprocessors, self.cluster)

    def _call(self, name, rows, *arguments):
        blocks = ctypes.c_long()
        function = getattr(self.library, f"simt_{name}")
        self._be_a_device()
        error = function(*self._list(rows), *arguments, self.order, ctypes.byref(blocks))
        self.blocks = blocks.value
        if error:
            raise RuntimeError(f"cudaError {error}")


def values_of(kind: str, n: int, generator) -> torch.Tensor:
    base = torch.randn(n, generator=generator)
    some = torch.rand(n, generator=generator)
    pick = int(torch.randint(n, (), generator=generator))
    base[pick] = -0.0
    return {
        "normal": lambda: base * 1e-3,
        "log-normal": lambda: (4 * base).exp(),
        "ties": lambda: (2 * base).round(),
        "mostly zero": lambda: base * (some < 0.2) * torch.where(some < 0.1, 1.0, -1.0),
        "constant": lambda: torch.full((n,), -2.5),
        "zeros": lambda: torch.zeros(n).copysign(base),
        "denormal": lambda: base * 1e-40,
        "tiny": lambda: base * 1e-27,
        "with inf": lambda: torch.where(some < 0.1, torch.inf, base),
        "all inf": lambda: torch.full((n,), -torch.inf),
        "one NaN": lambda: base.index_fill(0, torch.tensor(pick), torch.nan),
        "all NaN": lambda: torch.full((n,), torch.nan),
        "sorted": lambda: base.abs().sort().values,
    }[kind]()


KINDS = (
    "normal", "log-normal", "ties", "mostly zero", "constant", "zeros", "denormal", "tiny",
    "with inf", "all inf", "one NaN", "all NaN", "sorted",
)  # fmt: skip


class Guarded:
    """A tensor inside a larger buffer, whose other elements must not change."""

    def __init__(self, values: torch.Tensor, offset: int, device="cpu"):
        self.buffer = torch.full((64 + offset + len(values) + 64,), 7.0, dtype=values.dtype).to(
            device
        )
        self.slice = slice(64 + offset, 64 + offset + len(values))
        self.tensor.copy_(values)

    @property
    def tensor(self):
        return self.buffer[self.slice]

    def copy(self):
        other = object.__new__(Guarded)
        other.buffer, other.slice = self.buffer.clone(), self.slice
        return other


def drawn_list(number, sizes, device="cpu", partner_dtypes=(None, *DTYPES)):
    """(tensors, partners or []): one tensor of each size; `number` seeds dtypes, kinds and alignments."""
    rng, generator = np.random.default_rng(number), torch.Generator().manual_seed(number)
    partner_dtype = partner_dtypes[number % len(partner_dtypes)]
    tensors, partners = [], []
    for i, n in enumerate(sizes):
        dtype = DTYPES[rng.integers(3)]
        kind = KINDS[(number + i) % len(KINDS)]
        values = values_of(kind, n, generator).to(dtype)
        tensors.append(Guarded(values, int(rng.choice([0, 0, 1, 3])), device))
        if partner_dtype is not None:
            # Mostly the tensor's own dtype: the fast path.
            other = partner_dtype if rng.random() < 0.5 else dtype
            ones = torch.rand(n, generator=generator).to(other) + 1
            ones[0] = torch.nan  # never multiplied, only kept or zeroed
            partners.append(Guarded(ones, int(rng.choice([0, 0, 2])), device))
    return tensors, partners


def assert_equal_lists(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert_same_bits(a.buffer, b.buffer)


def check_against_reference(tensors, ratio, partners=(), run=None):
    expected = [g.copy() for g in tensors], [g.copy() for g in partners]
    reference.prune_([g.tensor for g in expected[0]], ratio, [g.tensor for g in expected[1]])
    (run or launcher.prune_)([g.tensor for g in tensors], ratio, [g.tensor for g in partners])
    assert_equal_lists(tensors, expected[0])
    assert_equal_lists(partners, expected[1])


def insert(lists, ratio):
    return lists[0], ratio, lists[1]


def between_guards(values: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A copy of `values` that begins or ends where a page begins that must not be touched."""
    page = mmap.PAGESIZE
    pages = -(-values.nbytes // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (start, start + (pages + 1) * page):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), page, 0) == 0
    offset = page + at_end * (pages * page - values.nbytes)
    return torch.frombuffer(memory, dtype=values.dtype, count=len(values), offset=offset).copy_(
        values
    )


def assert_survives(work) -> None:
    """In a child, since an access to a guard ends the process."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # a fork has none of OpenMP's threads
            work()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def seen_by_the_sample(strips):
    """The strips of 16 bytes that the sample takes from a tensor of `strips` strips."""
    every = strips // 2**17
    drawn = torch.arange(2**17) * 2654435761 % 2**32 >> 8
    return torch.arange(2**17) * every + drawn % every


def held_sizes(cluster):
    """About one sweep per block; as many elements as a cluster takes, and one more, for a chain."""
    sweep, most = cluster * SWEEP, 2 * cluster * SWEEP
    return [SPAN + 1, max(sweep - 3, SPAN + 2), sweep, sweep + 5, most - 130, most, most + 1]


def rows_of(sizes, dtype, paired):
    partner = (16, launcher.CODES[dtype]) if paired else (0, 0)
    rows = [(16, partner[0], n, launcher.CODES[dtype], partner[1], 0, 0) for n in sizes]
    return launcher.array("q", itertools.chain(*rows))


NEAR_ABOVE = (  # the least key above the bin, weights to try, how many of them that key decides at least
    (0x3FC00000, [step / 10 for step in range(-12, 13)], 4),
    (0x3FC00064, [0.9, 0.9975, 0.998, 0.9985, 0.999], 4),
)


def thresholds_that_round_up_to_an_element_above_the_bin(n=SPAN + 501, cases=NEAR_ABOVE):
    """0x3FBFFFFF and 0x3FC00000 lie in different bins of 13 bits, with no float32 between them. 0x3FC00064
    becomes the threshold only if the weight is very close to 1."""
    for above, steps, least in cases:
        keys = torch.full((n,), above, dtype=torch.int32)
        keys[: n // 2] = 0x3F000000 + torch.arange(n // 2, dtype=torch.int32)
        keys[n // 2 - 3 : n // 2] = 0x3FBFFFFF
        keys[-9:] = above + 1
        t = keys.view(torch.float32)
        decided_above = 0
        for step in steps:
            ratio = (n // 2 - 1 + step) / (n - 1)
            decided_above += reference.magnitude_quantile(t, ratio).item() == t[n // 2].item()
            check_against_reference([Guarded(t, 0)], ratio, [Guarded(torch.ones(n), 0)])
        assert decided_above >= least
