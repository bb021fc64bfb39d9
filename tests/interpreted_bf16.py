"""Teaches Triton's CPU interpreter bfloat16, for the tests.

The interpreter keeps bfloat16 as its bits in uint16. It multiplies those bits as integers in tl.dot,
and it cuts off where float32 is narrowed. `install` mends these two; the kernels do every other
arithmetic in float32. tests/test_triton.py checks the result against torch.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits (uint16), to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def install() -> None:
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_float(data, source, target, rounding_mode):
        if source == tl.bfloat16 and target == tl.float32:
            return widen(data.view(np.uint16)).view(np.uint32)
        if source == tl.float32 and target == tl.bfloat16:
            return narrow(data.view(np.float32))
        return convert(data, source, target, rounding_mode)

    def create_dot(self, a, b, d, *options):
        def widened(handle):
            if handle.dtype.scalar != tl.bfloat16:
                return handle
            return interpreter.TensorHandle(widen(handle.data), tl.float32)

        return dot(self, widened(a), widened(b), d, *options)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot
