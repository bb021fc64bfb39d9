"""Checks shared by the public functions: each error says what was expected, what was got, what to do."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(tensor) -> str:
    if not isinstance(tensor, torch.Tensor):
        return f"{type(tensor).__name__} {tensor!r:.60}"
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def plain_tensors(op: str, **tensors) -> None:
    """Every argument is an ordinary strided floating-point tensor; all sit on one device."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: expected {name} to be a tensor, got {describe(tensor)}")
        if hasattr(tensor, "device_mesh"):  # DTensor
            raise TypeError(
                f"{op}: expected {name} to be a plain tensor, got a DTensor {describe(tensor)}; "
                f"pass its full tensor or to_local() part"
            )
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"{op}: expected {name} in float32, bfloat16, float16 or float64, "
                f"got {describe(tensor)}"
            )
        if tensor.layout != torch.strided:
            raise TypeError(f"{op}: expected {name} to be strided, got {tensor.layout}")
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) > 1:
        got = ", ".join(f"{name} on {t.device}" for name, t in tensors.items())
        raise ValueError(
            f"{op}: expected all tensors on one device, got {got}; move them with .to()"
        )


def lora_shapes(op: str, weight, lora_A, lora_B) -> None:
    """weight (out, in), lora_A (r, in), lora_B (out, r) with r >= 1, lora_A and lora_B of one dtype."""
    if weight.dim() != 2:
        raise ValueError(f"{op}: expected weight (out, in), got shape {tuple(weight.shape)}")
    out_features, in_features = weight.shape
    if lora_A.dim() != 2 or lora_A.shape[1] != in_features:
        raise ValueError(
            f"{op}: expected lora_A (r, in) = (r, {in_features}) to match weight "
            f"{tuple(weight.shape)}, got {tuple(lora_A.shape)}"
        )
    r = lora_A.shape[0]
    if r < 1:
        raise ValueError(f"{op}: expected rank r >= 1, got lora_A {tuple(lora_A.shape)}")
    if tuple(lora_B.shape) != (out_features, r):
        raise ValueError(
            f"{op}: expected lora_B (out, r) = {(out_features, r)}, got {tuple(lora_B.shape)}"
        )
    if lora_A.dtype != lora_B.dtype:
        raise TypeError(
            f"{op}: expected lora_A and lora_B of one dtype, got {lora_A.dtype} and {lora_B.dtype}"
        )


def finite_number(op: str, name: str, value) -> float:
    """`value` as a float; NaN and inf are refused."""
    if isinstance(value, (torch.Tensor, bool)) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: expected {name} to be a number, got {describe(value)}")
    if not -float("inf") < value < float("inf"):
        raise ValueError(f"{op}: expected a finite {name}, got {value}")
    return float(value)


def fraction(op: str, name: str, value) -> float:
    """`value` as a float within [0, 1]."""
    number = finite_number(op, name, value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{op}: expected 0 <= {name} <= 1, got {value}")
    return number
