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


def compiled_for(archs: list[str], cache: Path) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("triton_aot.py"), *archs],
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("archs", [(80, 90), (100, 120)])  # halves, for two processes of pytest
def test_compiles_for_every_target(tmp_path, archs):
    import triton

    newer_ptxas = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
    rows = compiled_for(list(map(str, archs)), tmp_path)
    assert {row["arch"] for row in rows} == set(archs)
    assert len(rows) == sum(73 + 10 * (arch >= 90) for arch in archs)  # TMA from sm_90 on
    for row in rows:
        odd = " odd" in row["kernel"]
        # ptxas for Blackwell spills a few registers in kernels where its limit is no multiple of ours, and
        # that of Triton 3.8 in one for sm_80.
        one = newer_ptxas and row["kernel"] == "low_rank P r=128 fp32"
        few_spills = row["arch"] in (100, 120) or (row["arch"] == 80 and (odd or one))
        assert row["spills"] <= (4 if few_spills else 0), row
        assert row["shared"] <= row["most_shared"], row
        assert all(op.startswith(TENSOR_CORE[row["arch"]]) for op in row["tensor_core"]), row
        elsewhere = row["kernel"].startswith(("reduce", "mask", "prune")) or row["kernel"].endswith(
            "fp32"
        )
        assert row["tensor_core"] or elsewhere, row
        if row["kernel"].endswith("fp32") and row["kernel"].startswith(
            ("two_seg", "low_r", "split")
        ):
            # Multiplied in float32 itself, and the longest chain of sums is one step's.
            assert not row["tensor_core"] and 0 < row["fma"] <= 16 * row["adds"], row
        if row["kernel"].startswith("prune"):
            # `reads`: the passes over whole tensors; the others go over the few elements that are left.
            pass_name = " ".join(row["kernel"].split()[1:-1])
            reads = pass_name in ("count first", "digits", "partition", "random")
            assert "LDG.E.128" in row["global"] or not reads, row
            assert "STG.E.128" in row["global"] or pass_name not in ("partition", "random"), row
            continue
        assert odd or "STG.E.128" in row["global"], row
        if "_tma" in row["kernel"]:
            assert row["tma"] == ["UTMALDG"], row
            continue
        loads = [op for op in row["global"] if op.startswith("LDG") and op.endswith(".128")]
        assert odd or loads, row  # LDG or LDGSTS
        if row["kernel"].startswith("merge"):
            # W is read and written only sixteen bytes at a time.
            plain = [op for op in row["global"] if op.startswith(("LDG.", "STG."))]
            assert plain == ["LDG.E.128", "STG.E.128"], row
