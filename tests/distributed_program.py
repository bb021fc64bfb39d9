"""One rank of test_train_distributed.py: runs of relora-train, one after the other.

`torchrun --nproc-per-node N tests/distributed_program.py CASES.json`, gloo on a CPU. A case is
{"out": folder, "flags": [...]}, optionally with "nan_on" or "stop_on" (a rank), or {"check": a function below}.
"""

import faulthandler
import gc
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from relora_kernels import (
    FusedReLoRaLinear,
    ReLoRaConfig,
    ReLoRaSchedule,
    apply_relora,
    ranks,
    reset_optimizer,
)
from relora_kernels.model import lora_parameters, relora_layers
from relora_kernels.sharding import whole
from relora_kernels.train import ReLoRaCallback, ReLoRaTrainer, cli
from relora_kernels.train.data import Blocks


class SpyCallback(ReLoRaCallback):
    """Writes what each restart drew, A and which moments were kept, into `folder`."""

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


def schedule_of(seed=0, dtype=None, layers=1):
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(FusedReLoRaLinear(8, 8, r=2, name=str(i), dtype=dtype) for i in range(layers))
    )
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
    weight = model[0].weight.clone()
    code = expect_error(
        f"another 0: {other} on ranks [1] than on rank 0; nothing was merged",
        lambda: repeat(4, schedule),
    )
    assert torch.equal(model[0].weight, weight) and model[0].merge_count == 0
    return code


def other_factors_case42() -> int:
    model, schedule = schedule_of()
    with torch.no_grad():
        model[0].lora_A[0, 0] += ranks.index() == 1
    return refuses_to_merge(model, schedule, "lora_A")


def other_residual_case42() -> int:
    """As if only rank 0 had loaded a checkpoint: DistributedDataParallel does not broadcast residuals."""
    model, schedule = schedule_of(dtype=torch.bfloat16)
    if ranks.index() == 0:
        model.state_dict()["0.weight_residual"][3, 3] = 1e-3
    return refuses_to_merge(model, schedule, "weight_residual")


def other_layers() -> int:
    _, schedule = schedule_of(layers=1 + ranks.index())
    return expect_error("expected the same layers on all ranks, got", lambda: repeat(4, schedule))


def repeat(steps, schedule):
    for _ in range(steps):
        schedule.optimizer.step()
        schedule.step()


def moments_of_zero_redundancy() -> int:
    """Each rank resets the moments that it keeps, as one process would reset all."""
    for mode in ("zero", "random", "magnitude"):
        found = []
        for shared in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(*(FusedReLoRaLinear(8, 8, r=2, name=str(i)) for i in range(3)))
            factors = list(lora_parameters(model))
            if shared:
                optimizer = ZeroRedundancyOptimizer(factors, torch.optim.AdamW, lr=0.1)
            else:
                optimizer = torch.optim.AdamW(factors, lr=0.1)
            for step in range(2):
                model(
                    torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
                ).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            reset_optimizer(optimizer, factors, mode, 0.5, seed=3)
            state = getattr(optimizer, "optim", optimizer).state
            found.append({i: state[p]["exp_avg"] for i, p in enumerate(factors) if p in state})
        alone, mine = found
        assert 0 < len(mine) < len(alone) == 6
        assert all(torch.equal(moment, alone[i]) for i, moment in mine.items())
    return 0


def trainer_of(folder, sharded, **settings):
    """Six steps, a restart at 4, an evaluation and a checkpoint every two."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                         num_attention_heads=2)  # fmt: skip
    model = apply_relora(LlamaForCausalLM(config), ReLoRaConfig(r=4))
    if sharded:
        fully_shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    schedule = ReLoRaSchedule(model, optimizer, lambda t: 1.0, 4, 1)
    blocks = np.random.default_rng(0).integers(0, 64, (64, 16))
    args = TrainingArguments(
        output_dir=folder, max_steps=6, per_device_train_batch_size=2, save_steps=2, eval_steps=2,
        eval_strategy="steps", load_best_model_at_end=True, report_to="none", disable_tqdm=True,
        use_cpu=True, **settings,
    )  # fmt: skip
    return ReLoRaTrainer(
        model, args, train_dataset=Blocks(blocks, 0, 64), eval_dataset=Blocks(blocks, 0, 8),
        optimizers=(optimizer, schedule.lr_scheduler), callbacks=[ReLoRaCallback(schedule)],
    )  # fmt: skip


def best_model(folder) -> int:
    """All ranks end with the best checkpoint, and save_model writes whole tensors."""
    for sharded in (False, True):
        trainer = trainer_of(f"{folder}/{sharded}", sharded)
        losses, evaluate = iter([3.0, 1.0, 2.0]), trainer.evaluate

        def ordered(*args, **kwargs):
            found = evaluate(*args, **kwargs)
            return found | {"eval_loss": next(losses)}

        trainer.evaluate = ordered
        trainer.train()
        best = Path(folder, str(sharded), "checkpoint-4")
        assert trainer.state.best_model_checkpoint == str(best)
        trainer.save_model(f"{folder}/{sharded}/saved")
        ranks.maximum([0])  # rank 0 has written it
        expected = load_file(best / "model.safetensors")
        saved = load_file(Path(folder, str(sharded), "saved", "model.safetensors"))
        for name, parameter in trainer.model.named_parameters():
            assert torch.equal(whole(parameter.detach()), expected[name]), name
            assert torch.equal(saved[name], expected[name]), name
    # A missing best checkpoint does not fail a finished run, and a failed write ends save_model on all ranks.
    kept = {name: whole(p.detach()).clone() for name, p in trainer.model.named_parameters()}
    ranks.maximum([0])
    if ranks.index() == 0:
        (best / "model.safetensors").unlink()
        Path(folder, "file").touch()
    trainer._load_best_model()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(whole(parameter.detach()), kept[name]), name
    try:
        trainer.save_model(f"{folder}/file/saved")
        raise AssertionError("wrote below a file")
    except OSError:
        ranks.maximum([0])  # all are here
    try:
        trainer_of(f"{folder}/compiled", True, torch_compile=True)
    except ValueError as error:
        assert "call model.compile() before" in str(error)
        return 0
    raise AssertionError("torch_compile was left out and nobody told")


def another_step_case42() -> int:
    """Rank 1 comes to the boundary a step early: no rank hangs, none merges. This must be the last case, because
    rank 0 has then sent more than rank 1."""
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
    gc.freeze()  # keeps the imports out of Accelerate's garbage collections
    faulthandler.dump_traceback_later(150, exit=True)  # a rank that hangs shows where
    cases = json.loads(Path(sys.argv[1]).read_text())
    for case in cases:
        code = globals()[case["check"]](*case.get("args", [])) if "check" in case else run(case)
        assert code == case.get("code", 0), (case, code)
    print(f"rank {ranks.index()} of {ranks.count()} is done", flush=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(
        0
    )  # gloo's threads abort an ordinary exit now and then, after all is done (torch 2.13)
