"""One rank of test_train_distributed.py: runs of relora-train, one after the other.

`torchrun --nproc-per-node N tests/distributed_program.py CASES.json`, gloo on a CPU. A case is
{"out": folder, "flags": [...]} with "nan_on", "stop_on" (a rank) or "check" (a function below) at will.
"""

import faulthandler
import gc
import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from relora_kernels import FusedReLoRaLinear, ReLoRaSchedule, ranks
from relora_kernels.model import lora_parameters, relora_layers
from relora_kernels.sharding import whole
from relora_kernels.train import ReLoRaCallback, cli


class SpyCallback(ReLoRaCallback):
    """Writes what each restart drew: A, and which moments were kept. `folder`: where to."""

    folder = None

    def on_step_end(self, args, state, control, **kwargs):
        before = self.schedule.cycle
        super().on_step_end(args, state, control, **kwargs)
        if self.schedule.cycle == before:
            return
        found = {p: whole(m.lora_A.detach()).cpu() for p, m in relora_layers(self.schedule.model)}
        for i, parameter in enumerate(lora_parameters(self.schedule.model)):
            moments = self.schedule.optimizer.state[parameter]
            found[f"kept.{i}"] = whole(moments["exp_avg"]).cpu() != 0
        if ranks.index() == 0:
            found = {key: tensor.contiguous() for key, tensor in found.items()}
            save_file(found, self.folder / f"restart-{self.schedule.cycle}.safetensors")


class TroubleCallback(SpyCallback):
    """On one rank: a loss that is not finite in step 3 of a phase, or SIGTERM in step 8."""

    nan_on = stop_on = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self.step = state.global_step
        if self.nan_on == ranks.index():
            model.model.norm.register_forward_hook(self._spoil)

    def _spoil(self, module, inputs, output):
        return output * torch.nan if self.step == 2 and module.training else output

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        self.step = state.global_step
        if self.stop_on == ranks.index() and self.step == 8:
            signal.raise_signal(signal.SIGTERM)


def run(case) -> int:
    SpyCallback.folder = Path(case["out"])
    TroubleCallback.nan_on, TroubleCallback.stop_on = case.get("nan_on"), case.get("stop_on")
    cli.ReLoRaCallback = TroubleCallback
    cli.report.plot_metrics = lambda *args: None  # takes as long as the training
    try:
        return cli.main(case["flags"])
    except SystemExit as end:
        return end.code


def schedule_of(seed=0, dtype=None):
    torch.manual_seed(seed)
    model = nn.Sequential(FusedReLoRaLinear(8, 8, r=2, name="0", dtype=dtype))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    return model, ReLoRaSchedule(model, optimizer, lambda t: 1.0, 4, 2)


def expect_error(message, work) -> int:
    try:
        work()
    except RuntimeError as error:
        assert message in str(error), error
        return 0
    raise AssertionError(f"expected an error: {message}")


def refuses_to_merge(model, schedule, other: str) -> int:
    def steps():
        for _ in range(4):
            schedule.optimizer.step()
            schedule.step()

    weight = model[0].weight.clone()
    code = expect_error(
        f"another 0: {other} on ranks [1] than on rank 0; nothing was merged", steps
    )
    assert torch.equal(model[0].weight, weight) and model[0].merge_count == 0
    return code


def other_factors_case42() -> int:
    model, schedule = schedule_of()
    with torch.no_grad():
        model[0].lora_A[0, 0] += ranks.index() == 1
    return refuses_to_merge(model, schedule, "lora_A")


def other_residual_case42() -> int:
    """As where rank 0 alone loads a checkpoint: DistributedDataParallel sends no residual."""
    model, schedule = schedule_of(dtype=torch.bfloat16)
    if ranks.index() == 0:
        model.state_dict()["0.weight_residual"][3, 3] = 1e-3
    return refuses_to_merge(model, schedule, "weight_residual")


def another_step_case42() -> int:
    """Rank 1 comes to the boundary a step early: neither hangs, none merges. The last case, for rank 0
    has sent more than rank 1 then."""
    model, schedule = schedule_of()

    def steps():
        for step in range(4):
            if ranks.index() == 1 and step == 2:
                schedule.lr_scheduler.step()
            schedule.optimizer.step()
            schedule.step()

    code = expect_error("expected all ranks at one step, got 3 to 4", steps)
    assert model[0].merge_count == 0
    return code


def main() -> None:
    gc.freeze()  # Accelerate collects garbage after each phase: of all the imports
    faulthandler.dump_traceback_later(150, exit=True)  # a rank that waits for ever tells where
    cases = json.loads(Path(sys.argv[1]).read_text())
    for case in cases:
        code = globals()[case["check"]]() if "check" in case else run(case)
        assert code == case.get("code", 0), (case, code)
    print(f"rank {ranks.index()} of {ranks.count()} is done", flush=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(
        0
    )  # gloo's threads abort an ordinary exit now and then, after all is done (torch 2.13)
