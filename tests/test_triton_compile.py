"""Every Triton kernel compiles for every target without a GPU, within the machine's limits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from relora_kernels import backend

pytestmark = pytest.mark.skipif(
    backend.triton_missing() is not None, reason=str(backend.triton_missing())
)
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
MOST_SHARED = {80: 166912, 90: 232448, 100: 232448, 120: 101376}  # bytes a block may use


def test_compiles_for_every_target(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("triton_aot.py")],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {row["arch"] for row in rows} == set(TENSOR_CORE) and len(rows) == 24
    for row in rows:
        assert row["stack"] == row["spills"] == 0, row
        assert row["shared"] <= MOST_SHARED[row["arch"]], row
        assert all(op.startswith(TENSOR_CORE[row["arch"]]) for op in row["tensor_core"]), row
        assert row["tensor_core"], row
        # W is read and written sixteen bytes at a time, and in no other way.
        assert row["global"] == ["LDG.E.128", "STG.E.128"], row
