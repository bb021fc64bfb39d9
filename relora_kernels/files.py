"""Files that are whole or as they were before, and on disk when they have their names."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path


def sync(*paths: Path) -> None:
    """Files and folders, onto the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def temporary(path: Path) -> Path:
    """Where `replacing` has a file written. Of one process alone: a run's folder is locked."""
    return path.with_name(path.name + ".tmp")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """`temporary(path)`, to be written; it takes `path`'s place at the end, and goes after an error."""
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
    """A full disk as OSError: safetensors and tokenizers, in Rust, raise exceptions of their own."""
    try:
        yield
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError) or not found:
            raise
        raise OSError(int(found[1]), str(error)) from error
