"""ReLoRA under FSDP2 equals the single process: merge, draw of A, optimizer reset (fault 8, fault 7)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed


@pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch is built without distributed"
)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_fully_sharded_equals_one_process(world_size):
    program = Path(__file__).with_name("sharded_program.py")
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(world_size), program],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("agrees") == world_size
