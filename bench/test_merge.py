"""merge_ against the eager merge and a device copy of W.

Bytes: W (and its residual) read and written once, A and B read once. FLOPs: 2 r per element.
"""

import common
import pytest


@pytest.mark.parametrize("problem, row", common.parameters(common.problems("merge")))
def test_merge(benchmark, problem, row):
    common.measure_row(benchmark, problem, row)
