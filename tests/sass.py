"""Machine code of cubins as text. nvdisasm takes most of a second to start, so one run handles many kernels."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

TOOLS = ("cuobjdump", "nvdisasm")


def find_tools(*folders: Path) -> Path | None:
    """The first folder that holds both TOOLS: of `folders`, on PATH, or Triton's; None if there is none."""
    on_path = shutil.which(TOOLS[0])
    candidates = [*folders] + ([Path(on_path).parent] if on_path else [])
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(Path(triton.origin).parent / "backends/nvidia/bin")
    return next(
        (c for c in candidates if all(os.access(c / tool, os.X_OK) for tool in TOOLS)), None
    )


def functions(cubin: bytes) -> dict[str, bytes]:
    """Each function's code, by its (mangled) name: the sections .text.* of an ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<3H", cubin, 58)
    # A section header: name, type; flags, address, offset, size; the rest is not needed here.
    sections = [struct.unpack_from("<2I4Q2I2Q", cubin, table + i * size) for i in range(count)]
    found = {}
    for name, _, _, _, offset, length, *_ in sections:
        start = sections[names][4] + name
        name = cubin[start : cubin.index(b"\0", start)].decode()
        if name.startswith(".text."):
            found[name.removeprefix(".text.")] = cubin[offset : offset + length]
    return found


def disassembled(codes: list[bytes], arch: str, tools: Path) -> list[str]:
    """The instructions of each of `codes`, one per line; `arch` is "80" or "90a", for example."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        text = subprocess.run(
            [tools / "nvdisasm", "-b", f"SM{arch}", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    lines = [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]+)\*/ +(.*)", text)]
    found, ends = [[] for _ in codes], []
    for code in codes:
        ends.append((ends[-1] if ends else 0) + len(code))
    which = 0
    for at, line in lines:
        while at >= ends[which]:
            which += 1
        found[which].append(line)
    assert all(found), "nvdisasm gave nothing for some of the code"
    return ["\n".join(each) for each in found]
