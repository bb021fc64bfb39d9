"""What Triton's CPU interpreter lacks for the tests: bfloat16, and some speed.

It stores bfloat16 as bits in uint16, multiplies these bits as integers in tl.dot, and truncates when it
narrows float32. `install` corrects both; the kernels do all other arithmetic in float32.
tests/test_triton.py checks the result against torch. The interpreter also scans all of triton.language
for members to replace at each function call within a kernel, a third of such tests' time; `install`
makes it look them up once.
"""

import functools
import inspect

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

    @functools.cache
    def builtins(language) -> list[str]:
        members = inspect.getmembers(language)
        return [name for name, member in members if tl.core.is_builtin(member)]

    def patch_builtin(language, builder, scope) -> None:
        for name in builtins(language):
            member = getattr(language, name)
            if tl.core.is_builtin(member):  # not replaced yet
                interpreter._patch_attr(language, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot
