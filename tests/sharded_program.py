"""One rank of test_sharded.py: the same ReLoRA run unsharded and under FSDP2 has to agree.

`torchrun --nproc-per-node N tests/sharded_program.py`, gloo on a CPU.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from relora_kernels import ReLoRaConfig, ReLoRaSchedule, apply_relora, merge_and_reinit
from relora_kernels.model import relora_layers
from relora_kernels.sharding import local_rows, whole


def build(weight_dtype=None, rounding=None):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(24, 37), nn.ReLU(), nn.Linear(37, 24)) for _ in range(2))
    )
    model = model if weight_dtype else model.double()
    config = ReLoRaConfig(
        r=5, target_modules="all-linear", weight_dtype=weight_dtype, merge_rounding=rounding
    )
    return apply_relora(model, config)


def shard(model):
    for block in model:
        fully_shard(block)
    return fully_shard(model)


def run(model, mode):
    """Outputs after each restart, factors, weights and moments of ten steps with two restarts."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    schedule = ReLoRaSchedule(
        model, optimizer, lambda t: 1.0, 4, 2, reset_mode=mode, reset_ratio=0.7
    )
    found = []
    for step in range(10):
        # The same batch on every rank: the averaged gradient is the single process's.
        x = torch.randn(6, 24, generator=torch.Generator().manual_seed(step)).double()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule.step():
            with torch.no_grad():  # leaves the root unsharded, as an evaluation before a merge does
                found.append(model(x))
    for state in optimizer.state.values():
        found += [whole(state["exp_avg"]), whole(state["exp_avg_sq"])]
    for _, layer in relora_layers(model):
        assert layer.merge_count == 2
        found += [whole(layer.weight), whole(layer.lora_A), whole(layer.lora_B)]
    return found


def training_agrees(mode) -> None:
    for a, b in zip(run(build(), mode), run(shard(build()), mode), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-7, atol=1e-9)


def merge_agrees(rounding) -> None:
    """Bit for bit, with factors whose products are exact in any order of summation."""
    alone, sharded = build(torch.bfloat16, rounding), shard(build(torch.bfloat16, rounding))
    for model in (alone, sharded):
        for i, (_, layer) in enumerate(relora_layers(model)):
            for k, p in enumerate((layer.lora_A, layer.lora_B)):
                generator = torch.Generator().manual_seed(2 * i + k)
                rows, first = local_rows(p.data)
                full = torch.randint(-8, 8, p.shape, generator=generator).float() / 2**7
                rows.copy_(full[first : first + len(rows)])
        merge_and_reinit(model)
    for (_, a), (_, b) in zip(relora_layers(alone), relora_layers(sharded)):
        assert torch.equal(whole(b.weight), a.weight) and torch.equal(whole(b.lora_A), a.lora_A)
        assert not whole(b.lora_B).any()
        if rounding == "compensated":
            rows, first = local_rows(b.weight)
            assert torch.equal(b.weight_residual, a.weight_residual[first : first + len(rows)])


def checkpoint_agrees() -> None:
    """The residual is gathered and cut as the weight is, through full and sharded state_dicts."""
    source, target = shard(build(torch.bfloat16)), shard(build(torch.bfloat16))
    for _, layer in relora_layers(source):
        local_rows(layer.lora_B.data)[0].fill_(1e-3)
    merge_and_reinit(source)
    full = get_model_state_dict(source, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        alone = build(torch.bfloat16)
        alone.load_state_dict(full)
        assert all(len(m.weight_residual) == len(m.weight) for _, m in relora_layers(alone))
    target.load_state_dict(source.state_dict())
    for (_, a), (_, b) in zip(relora_layers(source), relora_layers(target)):
        assert torch.equal(a.weight_residual, b.weight_residual) and a.weight_residual.any()


def refusal_agrees() -> None:
    model = shard(build())
    layer = model[0][0]
    rows, first = local_rows(layer.lora_B.data)
    if first == 0:
        rows[0, 0] = torch.nan  # on one rank alone, yet all have to refuse
    before = local_rows(layer.weight)[0].clone()
    try:
        merge_and_reinit(model)
    except FloatingPointError:
        assert torch.equal(local_rows(layer.weight)[0], before) and layer.merge_count == 0
        return
    raise AssertionError("merged an update that is not finite")


def main() -> None:
    dist.init_process_group("gloo")
    for mode in ("magnitude", "random", "zero"):
        training_agrees(mode)
    for rounding in ("nearest", "stochastic", "compensated"):
        merge_agrees(rounding)
    checkpoint_agrees()
    refusal_agrees()
    print(f"rank {dist.get_rank()} of {dist.get_world_size()} agrees")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(
        0
    )  # gloo's threads abort an ordinary exit now and then, after all is done (torch 2.13)
