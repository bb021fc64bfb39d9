"""ReLoRA under FSDP2 equals the single process: merge, draw of A, optimizer reset."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed

from relora_kernels.sharded_prune import prune_sharded_


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


def test_plain_tensors_are_pruned_as_they_are_and_unlike_partners_refused():
    t, partner = torch.tensor([3.0, -1.0, 2.0]), torch.ones(3)
    with pytest.raises(ValueError, match=r"partners sharded as their tensors.*\(3,\).*\(4,\)"):
        prune_sharded_([t], 0.5, [torch.ones(4)])
    prune_sharded_([t], 0.5, [partner])
    assert t.tolist() == [3.0, 0.0, 0.0] and partner.tolist() == [1.0, 0.0, 0.0]
