"""Atomic file writes: a file is either complete or unchanged, and is on disk before it gets its name."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path


def sync(*paths: Path) -> None:
    """fsync files and folders."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def temporary(path: Path) -> Path:
    """The path that `replacing` writes to. Not unique per process: a run's folder is locked."""
    return path.with_name(path.name + ".tmp")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields `temporary(path)` to write to. It replaces `path` at the end and is deleted after an error."""
    written = temporary(path)
    try:
        yield written
        sync(written)
        written.replace(path)
    except BaseException:
        written.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as written:
        written.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Turn system errors such as a full disk into OSError: safetensors and tokenizers, which are written in
    Rust, raise their own exceptions."""
    try:
        yield
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError) or not found:
            raise
        raise OSError(int(found[1]), str(error)) from error
