"""prune_, random pruning and magnitude histograms in CUDA. Formulas: reference/prune.py. Kernels: csrc/prune.cu."""

from __future__ import annotations

from array import array

import torch

from relora_kernels.cuda import extension, why_no_device
from relora_kernels.ops.checks import Tensors
from relora_kernels.reference.prune import NONE_ABOVE, drop_below, rank_rule

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # launch.h's DType
MOST_BITS = 13  # of a digit, by csrc/prune.cu


def why_not(tensors, ratio, paired_with) -> str | None:
    """Why the kernels cannot serve this call; None if they can."""
    dtypes = {*Tensors.of(tensors).dtypes, *Tensors.of(paired_with).dtypes}
    for dtype in dtypes - CODES.keys():
        return f"a tensor in {dtype}; the kernels take float32, bfloat16 and float16"
    return why_no_device(tensors[0].device) if tensors else None


def why_not_random(tensors, ratio, paired_with, seeds, first_elements) -> str | None:
    return why_not(tensors, ratio, paired_with)


def why_not_counts(tensors, prefixes, shift, bits) -> str | None:
    if bits > MOST_BITS:
        return f"digits of {bits} bits; the kernel counts up to {MOST_BITS}"
    return why_not(tensors, None, [])


def prune_(tensors, ratio, paired_with) -> None:
    """Arguments as checked by ops/prune.py, on one device."""
    flat = _Flat(tensors, paired_with)
    module, device = extension()[0], tensors[0].device
    with torch.cuda.device(device):
        needed = module.prune_workspace(flat.rows, device.index)
    workspace = torch.empty(needed, dtype=torch.uint8, device=device)
    flat.run("prune_", module.prune, *rank_rule(ratio), workspace.data_ptr(), needed)


def prune_random_(tensors, ratio, paired_with, seeds, first_elements) -> None:
    """Arguments as in reference/prune.py, on one device."""
    flat = _Flat(tensors, paired_with, seeds, first_elements)
    flat.run("prune_random_", extension()[0].prune_random, drop_below(ratio))


def magnitude_counts(tensors, prefixes, shift, bits):
    """Arguments and results as in reference/prune.py; bits <= MOST_BITS."""
    device = prefixes.device
    counts = torch.zeros(len(tensors), 2**bits, dtype=torch.int64, device=device)
    lowest = torch.full((len(tensors),), NONE_ABOVE, dtype=torch.int64, device=device)
    highest = torch.full((len(tensors),), -1, dtype=torch.int64, device=device)
    prefixes = prefixes.contiguous()
    pointers = [t.data_ptr() for t in (counts, lowest, highest)]
    flat = _Flat(tensors)
    flat.run(
        "_magnitude_counts", extension()[0].magnitude_counts,
        prefixes.data_ptr(), shift, bits, *pointers, written=False,
    )  # fmt: skip
    return counts, lowest, highest


class _Flat:
    """A list and its partners as the kernels take them: contiguous (copies of strided ones), as rows of seven
    int64 (launch.h's PruneTensor)."""

    def __init__(self, tensors, partners=(), seeds=(), first=()):
        self.given = self.flat = [*tensors, *partners]
        tensors, partners = Tensors.of(tensors), Tensors.of(partners)
        if not (tensors.contiguous and partners.contiguous):
            tensors, partners = (
                Tensors(t.contiguous() for t in some) for some in (tensors, partners)
            )
            self.flat = [*tensors, *partners]
        columns = (
            tensors.pointers,
            partners.pointers,
            [t.numel() for t in tensors],
            list(map(CODES.get, tensors.dtypes)),
            list(map(CODES.get, partners.dtypes)),
            seeds,
            first,
        )
        self.rows = array("q", bytes(8 * len(columns) * len(tensors)))
        for i, column in enumerate(columns):
            if column:  # else zeros: no partners, no seeds
                self.rows[i :: len(columns)] = array("q", column)

    def run(self, op: str, function, *arguments, written: bool = True) -> None:
        device = self.given[0].device
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream().cuda_stream
            try:
                function(self.rows, *arguments, device.index, stream)
            except RuntimeError as error:
                shapes = ", ".join(str(tuple(t.shape)) for t in self.given[:8])
                more = f", ... ({len(self.given)} in all)" if len(self.given) > 8 else ""
                raise RuntimeError(f"{op}: tensors {shapes}{more} on {device}: {error}") from error
        if not written:
            return
        if self.flat is not self.given:
            for t, flat in zip(self.given, self.flat):
                if flat is not t:
                    t.copy_(flat)
        # The kernels write through raw pointers, which autograd cannot see.
        torch.autograd.graph.increment_version(self.given)
