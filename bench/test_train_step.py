"""Tokens/s and peak memory of one training step: full rank, eager LoRA, ours; eager and compiled.

At equal microbatch (the presets'), and at the largest that fits RELORA_BENCH_GIB (24). On a CPU, a micro
model.
"""

import common
import pytest
import train_step


@pytest.mark.parametrize("case", train_step.cases(common.GPU), ids=lambda case: case["name"])
def test_train_step(benchmark, case):
    def timer(step):
        benchmark.pedantic(step, rounds=12 if common.GPU else 3)
        return benchmark.stats.stats.data if benchmark.stats else train_step.in_turn(step)

    record = train_step.run(case, common.DEVICE, timer)
    if record["status"] != "ok":
        pytest.skip(record["reason"])
    benchmark.group = record["group"]
    benchmark.extra_info.update(record)
