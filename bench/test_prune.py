"""prune_ against a loop over torch.quantile, kthvalue or sort, and a device copy of the tensors.

Bytes: each element read twice and written once, its partner read and written once.
"""

import common
import pytest


@pytest.mark.parametrize("problem, row", common.parameters(common.problems("prune")))
def test_prune(benchmark, problem, row):
    common.measure_row(benchmark, problem, row)
