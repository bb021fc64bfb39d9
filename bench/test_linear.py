"""lora_linear against the formulas that people use instead. Floor: frozen GEMM plus rank-r terms.

FLOPs: 2 M (N K + r (N + K)) forward, 2 M (N K + 2 r (N + K)) backward; bytes: each operand once per pass.
"""

import common
import pytest


@pytest.mark.parametrize("problem, row", common.parameters(common.problems("linear")))
def test_linear(benchmark, problem, row):
    common.measure_row(benchmark, problem, row)
