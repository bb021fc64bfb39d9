"""Checks shared by the public functions. Each error says what was expected, what was got and what to do."""

from __future__ import annotations

import functools
import numbers
import operator
import types
from collections.abc import Sequence

import numpy as np
import torch
from torch._subclasses import FakeTensor

ROUNDINGS = ("nearest", "stochastic", "compensated")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Tensors(list):
    """A list of tensors that caches their dtypes, pointers and contiguity: each look-up takes 50 ns, and a
    model has hundreds of moments."""

    @classmethod
    def of(cls, tensors) -> Tensors:
        return tensors if type(tensors) is cls else cls(tensors)

    @functools.cached_property
    def dtypes(self) -> list[torch.dtype]:
        return [t.dtype for t in self]

    @functools.cached_property
    def pointers(self) -> list[int]:
        return [t.data_ptr() for t in self]

    @functools.cached_property
    def contiguous(self) -> bool:
        return all([t.is_contiguous() for t in self])


def describe(tensor) -> str:
    if not isinstance(tensor, torch.Tensor):
        return f"{type(tensor).__name__} {tensor!r:.60}"
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def some(names, count: int = 4) -> str:
    """The first `count` of `names`, for a message."""
    names = list(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def no_subclass(op: str, **tensors) -> None:
    """Raise TypeError for tensors of a class with operations of its own, such as quantized ones: what is written
    to them in place may go to a temporary."""
    for name, tensor in tensors.items():
        own = type(tensor).__torch_dispatch__ != torch.Tensor.__torch_dispatch__
        if own and not isinstance(tensor, FakeTensor):
            raise TypeError(
                f"{op}: expected {name} to be an ordinary tensor, got a {type(tensor).__name__}, which computes "
                f"by operations of its own; dequantize it first, or leave it out"
            )


def plain_tensors(op: str, **tensors) -> None:
    """Each argument must be an ordinary strided floating-point tensor; all must be on one device."""
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
            raise TypeError(
                f"{op}: expected {name} to be strided, got {tensor.layout}; call to_dense() on it"
            )
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) > 1:
        got = ", ".join(f"{name} on {t.device}" for name, t in tensors.items())
        raise ValueError(
            f"{op}: expected all tensors on one device, got {got}; move them with .to()"
        )


def lora_shapes(op: str, weight, lora_A, lora_B) -> None:
    """Expects weight (out, in), lora_A (r, in), lora_B (out, r), r >= 1, lora_A and lora_B of one dtype."""
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


def writable(op: str, tensors) -> None:
    """Refuses inference tensors outside of inference mode: torch raises only after they were written."""
    if torch.is_inference_mode_enabled():
        return
    for t in tensors:
        if t.is_inference():
            raise ValueError(
                f"{op}: expected tensors that may be written here, got {describe(t)}, made in "
                f"torch.inference_mode(); clone() it, or call this there"
            )


def no_overlap(op: str, name: str, tensor: torch.Tensor) -> None:
    """No two elements of `tensor` may share memory, because it is written in place."""
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1 and stride < extent:
            raise ValueError(
                f"{op}: expected {name} without overlapping elements, got shape "
                f"{tuple(tensor.shape)} with strides {tensor.stride()}; clone() it first"
            )
        extent += stride * (size - 1)


def apart(op: str, *lists, read=()) -> None:
    """No tensor of `lists`, which are written, may share memory with another one of them or of `read`.

    Interleaved views, such as two column ranges of one matrix, are allowed.
    """
    # Fast path: take each tensor as one span. If no span, in order, begins before the last one ended, done.
    lists, read = [Tensors.of(some) for some in lists], Tensors.of(read)
    starts = [at for some in (*lists, read) for at in some.pointers]
    sizes = [t.nbytes if some.contiguous else _extent(t) for some in (*lists, read) for t in some]
    ends = sorted(map(operator.add, starts, sizes))
    starts.sort()
    if all(map(operator.le, ends, starts[1:])):
        return
    written = [t for some in lists for t in some]
    every = [*written, *read]
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + _extent(t), i)
        for i, t in enumerate(every)
        if t.numel() > 0 and t.data_ptr() != 0  # 0: on meta, or FSDP has freed it
    )
    open_spans: list[tuple[int, int]] = []  # end and index of spans that may reach beyond `start`
    for start, end, i in spans:
        open_spans = [span for span in open_spans if span[0] > start]
        for _, other in open_spans:
            if min(i, other) < len(written) and _share_memory(every[i], every[other]):
                got = " and ".join(describe(every[k]) for k in sorted((i, other)))
                raise ValueError(
                    f"{op}: expected tensors in memory of their own, got two that overlap, {got}; pass "
                    f"each tensor once, or clone() one"
                )
        open_spans.append((end, i))


def _extent(t: torch.Tensor) -> int:
    """Bytes from the first element to behind the last one."""
    if t.numel() == 0:
        return 0
    return t.itemsize * (1 + sum(s * (n - 1) for s, n in zip(t.stride(), t.shape)))


def _share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Of tensors whose spans overlap."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    try:
        return np.shares_memory(_as_numpy(a), _as_numpy(b), max_work=100_000)
    except np.exceptions.TooHardError:
        return True


def _as_numpy(t: torch.Tensor) -> np.ndarray:
    """An array of `t`'s addresses, on a GPU too. Its elements must not be touched."""
    layout = {
        "version": 3,
        "data": (t.data_ptr(), True),
        "shape": tuple(t.shape),
        "strides": tuple(s * t.itemsize for s in t.stride()),
        "typestr": f"|V{t.itemsize}",
    }
    return np.asarray(types.SimpleNamespace(__array_interface__=layout))


def finite_number(op: str, name: str, value) -> float:
    """`value` as a float; NaN and inf are refused."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
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


def whole_number(op: str, name: str, value, least: int) -> int:
    """`value` as an int >= least."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{op}: expected a whole number {name} >= {least}, got {value!r}")
    return value


def int64(op: str, name: str, value) -> int:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not -(2**63) <= value < 2**63:
        raise ValueError(f"{op}: expected {name} to be an int64, got {value!r}")
    return int(value)


def float_dtype(op: str, name: str, value) -> None:
    if value not in FLOATS:
        raise ValueError(
            f"{op}: expected {name} to be a floating torch.dtype (float32, bfloat16, float16 or "
            f"float64), got {value!r}"
        )


def one_of(op: str, name: str, value, known: Sequence) -> None:
    if value not in known:
        raise ValueError(f"{op}: expected {name} to be one of {tuple(known)}, got {value!r}")


def lora_options(op: str, r, lora_alpha, lora_dropout, merge_rounding, seed, dtypes: dict) -> None:
    """Checks the options that FusedReLoRaLinear and ReLoRaConfig have in common."""
    whole_number(op, "rank r", r, 1)
    if finite_number(op, "lora_alpha", lora_alpha) <= 0.0:
        raise ValueError(f"{op}: expected lora_alpha > 0, got {lora_alpha}")
    fraction(op, "lora_dropout", lora_dropout)
    one_of(op, "merge_rounding", merge_rounding, (None, *ROUNDINGS))
    int64(op, "seed", seed)
    for name, dtype in dtypes.items():
        if dtype is not None:
            float_dtype(op, name, dtype)
