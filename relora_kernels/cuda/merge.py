"""merge_ in CUDA. Formula: reference/merge.py. Kernel: csrc/merge.cu."""

from __future__ import annotations

import torch

from relora_kernels.cuda import extension, why_no_device

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def why_not(weight, lora_A, lora_B, scaling, rounding, residual, seed, first_row) -> str | None:
    """Why the kernel cannot serve this call; None where it can."""
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
    if rounding == "compensated" and residual is None:  # float32: nothing is dropped to keep
        rounding = "nearest"
    with torch.cuda.device(weight.device):
        extension()[0].merge(
            weight=_matrix(weight),
            residual=_matrix(residual),
            lora_A=_matrix(lora_A),
            lora_B=_matrix(lora_B),
            sizes=(*weight.shape, lora_A.shape[0]),
            weight_dtype=DTYPES[weight.dtype],
            factor_dtype=DTYPES[lora_A.dtype],
            rounding=rounding,
            scaling=scaling,
            seed=seed % 2**64,
            first_row=first_row,
            device=weight.device.index,
            stream=torch.cuda.current_stream().cuda_stream,
        )
    # The kernel writes through raw pointers, which autograd cannot see.
    written = [weight] if rounding != "compensated" else [weight, residual]
    torch.autograd.graph.increment_version(written)


def _matrix(tensor: torch.Tensor | None) -> tuple[int, int, int]:
    """Pointer and strides in elements."""
    return (0, 0, 0) if tensor is None else (tensor.data_ptr(), *tensor.stride())
