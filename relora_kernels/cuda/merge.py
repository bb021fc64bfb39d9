"""merge_ in CUDA, for one layer or a list. Formula: reference/merge.py. Kernels: csrc/merge*.cu."""

from __future__ import annotations

import functools
import struct

import torch

from relora_kernels.cuda import extension, why_no_device

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

# launch.h's MergeLayer: six matrices, each a pointer and two strides; n, k, r, restart_rows; two seeds; two
# first rows; scaling and restart_step; restarts; three numbers that the launch fills in.
_LAYER = struct.Struct("=18q4q2Q2q2f4I")
_NOTHING = (0, 0, 0)
_NO_RESTART = (None, None, None, 0.0, 0, 0)
_MOST_PITCH = 2**29  # limit of the sm90 kernel on columns and row pitch, in elements

# The kernel for layers that the sm_90 kernel can take. csrc/merge.cu describes both; bench/gpu_check.py times
# both ("by KERNEL").
KERNEL = "sm90"
KERNELS = ("streamed", "sm90")


def why_not(weight, lora_A, lora_B, scaling, rounding, residual, seed, first_row) -> str | None:
    """Why the kernel cannot serve this call; None if it can."""
    reason = why_no_device(weight.device)
    if reason is not None:
        return reason
    given = [t for t in (weight, lora_A, lora_B, residual) if t is not None]
    if any(t.device != weight.device for t in given):
        return f"expected all tensors on {weight.device}, got {[str(t.device) for t in given]}"
    if any(t.dtype not in DTYPES for t in given) or lora_A.dtype != lora_B.dtype:
        return (
            "expected float32, bfloat16 or float16, one dtype for lora_A and lora_B, got "
            f"{[str(t.dtype) for t in given]}"
        )
    if residual is not None and residual.dtype != weight.dtype:
        return f"expected residual in weight's dtype {weight.dtype}, got {residual.dtype}"
    return None


def merge_(weight, lora_A, lora_B, scaling, rounding, residual, seed, first_row) -> None:
    """weight (out, in), lora_A (r, in), lora_B (out, r), residual (out, in) or None; all 2-D."""
    merge_many_([(weight, lora_A, lora_B, scaling, rounding, residual, seed, first_row)])


def merge_many_(merges, restarts=None) -> None:
    """Every merge, a tuple of merge_'s arguments, in one launch per device, dtypes, rounding and kernel.

    `restarts`: for each merge (lora_A, lora_B, merge_count, bound, seed, first_row), or None. After the
    write lora_A (the parameter, or the rows of its shard) is drawn from U(-bound, bound) by
    (seed, first_row), lora_B is zeroed, and 1 is added to merge_count.
    """
    module, _ = extension()
    groups: dict[tuple, list] = {}
    for merge, restart in zip(merges, restarts or [None] * len(merges)):
        weight, lora_A, lora_B, scaling, rounding, residual, seed, first_row = merge
        if residual is None and rounding == "compensated":  # float32: rounding drops nothing
            rounding = "nearest"
        # Depends on this layer alone, so that the rest of the list cannot change a bit of its result.
        kept = residual if rounding == "compensated" else None
        kind = _kernel(weight, lora_A.shape[0], scaling, kept, module)
        # Factors in a dtype that the kernel does not take are converted to float32, which is exact.
        narrow = kind == "sm90" and lora_A.dtype == torch.bfloat16
        wanted = torch.bfloat16 if narrow else torch.float32
        restarted = wanted if restart is None else restart[0].dtype
        factors = lora_A, lora_B
        if lora_A.dtype != wanted:  # this test is quicker than `to` for hundreds of layers
            factors = lora_A.to(wanted), lora_B.to(wanted)
        key = weight.device, weight.dtype, wanted, restarted, rounding, kind
        groups.setdefault(key, []).append((weight, *factors, merge, restart))
    # All tables before the first launch: running out of memory later would leave the list half merged.
    tables = [
        _table(module, device, kind, len(group)) for (device, *_, kind), group in groups.items()
    ]
    for (key, group), table in zip(groups.items(), tables):
        _launch(module, *key, group, table)


def _kernel(weight, r, scaling, residual, module) -> str:
    """The kernel for this layer. launch.h says what the one for sm_90 can take."""
    if KERNEL != "sm90" or not module.merge_has_sm90 or not _is_hopper(weight.device):
        return "streamed"
    fits = r <= module.merge_most_rank and weight.shape[1] <= _MOST_PITCH
    fits = fits and (scaling == 0 or 2.0**-16 <= abs(scaling) < 2.0**7 - 2.0**-17)  # as float32
    sheets = [t for t in (weight, residual) if t is not None]
    rows = all(t.stride(1) == 1 and t.stride(0) <= _MOST_PITCH for t in sheets)
    return "sm90" if weight.dtype == torch.bfloat16 and rows and fits else "streamed"


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def _table(module, device, kind, layers: int) -> torch.Tensor | None:
    """Device memory for a launch's layers; None if they fit into its arguments."""
    if kind != "sm90" and layers <= module.merge_inline_layers:
        return None
    n_bytes = layers * _LAYER.size + module.merge_counter_bytes
    return torch.empty(n_bytes, dtype=torch.uint8, device=device)


def _launch(
    module, device, weight_dtype, factor_dtype, restart_dtype, rounding, kind, group, table
) -> None:
    layers, counts = bytearray(), []
    for weight, lora_A, lora_B, (*_, scaling, _, residual, seed, first_row), restart in group:
        drawn, zeroed, count, bound, drawn_seed, drawn_row = restart or _NO_RESTART
        layers += _LAYER.pack(
            *_matrix(weight),
            *_matrix(residual if rounding == "compensated" else None),
            *_matrix(lora_A),
            *_matrix(lora_B),
            *_matrix(drawn),
            *_matrix(zeroed),
            *weight.shape,
            lora_A.shape[0],
            0 if drawn is None else drawn.shape[0],
            seed % 2**64,
            drawn_seed % 2**64,
            first_row,
            drawn_row,
            scaling,
            bound * 2.0**-23,
            restart is not None, 0, 0, 0,
        )  # fmt: skip
        if count is not None:
            counts.append(count)
    with torch.cuda.device(device):
        if counts:  # first: if memory runs out here, no layer has been merged uncounted
            torch._foreach_add_(counts, 1)
        try:
            module.merge(
                layers=layers,
                weight_dtype=DTYPES[weight_dtype],
                factor_dtype=DTYPES[factor_dtype],
                restart_dtype=DTYPES[restart_dtype],
                rounding=rounding,
                kind=kind,
                table=0 if table is None else table.data_ptr(),
                device=device.index,
                stream=torch.cuda.current_stream().cuda_stream,
            )
        except BaseException:
            if counts:
                torch._foreach_sub_(counts, 1)
            raise
    # The kernels write through raw pointers, which autograd cannot see.
    written = [weight for weight, *_ in group]
    written += [merge[5] for *_, merge, _ in group if rounding == "compensated"]
    written += [tensor for *_, restart in group if restart is not None for tensor in restart[:2]]
    torch.autograd.graph.increment_version(written)


def _matrix(tensor: torch.Tensor | None) -> tuple[int, int, int]:
    """Pointer and strides in elements."""
    return _NOTHING if tensor is None else (tensor.data_ptr(), *tensor.stride())
