"""One rank of test_sharded.py: a ReLoRA run under FSDP2 must agree with the same run unsharded.

`torchrun --nproc-per-node N tests/sharded_program.py`, gloo on a CPU.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from relora_kernels import (
    FusedReLoRaLinear,
    ReLoRaConfig,
    ReLoRaSchedule,
    apply_relora,
    merge_and_reinit,
    merge_and_unload,
    reset_optimizer,
)
from relora_kernels.model import relora_layers
from relora_kernels.peft import save_adapter
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
    optimizer = adam_for(model)
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


def moments_of_every_kind(dtype) -> list[torch.Tensor]:
    """Uneven rows, fewer rows than ranks (empty shards), ties, a NaN on one rank, infinities, zeros."""
    torch.manual_seed(3)
    shapes = [(7, 5), (37, 11), (1, 40), (2, 3), (5,), (64, 33), (12, 1)]
    found = [torch.randn(shape).to(dtype) for shape in shapes]
    found += [t.round() for t in found[:3]] + [torch.full((9, 4), -2.5).to(dtype)]
    with_nan, with_inf, small = (torch.randn(13, 6).to(dtype) for _ in range(3))
    with_nan[-1, 2] = torch.nan
    with_inf[::3] = torch.inf
    return [*found, with_nan, with_inf, small * 1e-40, small * 0.0, small.new_empty(0, 3)]


def meshes():
    """(mesh, placements): rows sharded over all ranks; with four ranks also over two, in two replicas."""
    world = dist.get_world_size()
    yield init_device_mesh("cpu", (world,)), [Shard(0)]
    if world == 4:
        yield init_device_mesh("cpu", (2, 2)), [Replicate(), Shard(0)]
        yield init_device_mesh("cpu", (2, 2)), [Shard(0), Replicate()]


def adam_of(moments, place):
    """(optimizer, parameters) with these first moments; the second moments are float32."""
    params = [nn.Parameter(place(torch.zeros_like(m))) for m in moments]
    optimizer = torch.optim.AdamW(params)
    for i, (p, m) in enumerate(zip(params, moments)):
        second = torch.rand(m.shape, generator=torch.Generator().manual_seed(i)) + 1
        state = {
            "step": torch.tensor(3.0),
            "exp_avg": place(m.clone()),
            "exp_avg_sq": place(second),
        }
        optimizer.state[p] = state
    return optimizer, params


def pruning_agrees() -> None:
    """Bit for bit, without gathering a moment, in a few collectives for the whole list."""
    collectives = []
    all_reduce, full_tensor = dist.all_reduce, DTensor.full_tensor
    dist.all_reduce = lambda *args, **kwargs: collectives.append(1) or all_reduce(*args, **kwargs)
    for mesh, placements in meshes():
        for dtype, rounds in (
            (torch.float32, 4), (torch.bfloat16, 3), (torch.float16, 3), (torch.float64, 7),
        ):  # fmt: skip
            moments = moments_of_every_kind(dtype)
            for mode, ratio in (("magnitude", 0.9), ("magnitude", 0.31), ("random", 0.6)):
                alone, params = adam_of(moments, lambda t: t)
                reset_optimizer(alone, params, mode, ratio, seed=5)
                sharded, rows = adam_of(moments, lambda t: distribute_tensor(t, mesh, placements))
                collectives.clear()
                DTensor.full_tensor = None
                reset_optimizer(sharded, rows, mode, ratio, seed=5)
                DTensor.full_tensor = full_tensor
                assert len(collectives) == (rounds if mode == "magnitude" else 0)
                for p, row in zip(params, rows):
                    for key in ("exp_avg", "exp_avg_sq"):
                        ours, expected = sharded.state[row][key].full_tensor(), alone.state[p][key]
                        assert same_bits(ours, expected), (dtype, mode, ratio, expected.shape)
    dist.all_reduce = all_reduce


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))


def checkpoint_agrees() -> None:
    """Full and sharded state_dicts gather and shard the residual like the weight."""
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
    # A broadcast from rank 0 does not reach other ranks' residuals: the next restart refuses to lose their rows.
    sent = shard(build(torch.bfloat16))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(sent, full if dist.get_rank() == 0 else {}, options=options)
    get_model_state_dict(sent, options=StateDictOptions(full_state_dict=True))  # must not hang
    schedule, alone = scheduled(sent), dist.get_world_size() == 1
    if alone:
        assert schedule.step()
    else:
        refused(RuntimeError, "another 0.0: weight_residual on ranks [1", schedule.step)
    assert all(layer.merge_count == 1 + alone for _, layer in relora_layers(sent))


def one_row_agrees() -> None:
    """Rank 0 holds the only row, before and after a merge; the others must not wait for it for ever."""
    model = nn.Sequential(nn.Linear(8, 1), nn.Linear(1, 3))
    config = ReLoRaConfig(r=2, target_modules="all-linear", weight_dtype=torch.bfloat16)
    alone = apply_relora(model, config)
    expected = {key: t.clone() for key, t in alone.state_dict().items()}
    sharded = fully_shard(alone)
    for _ in range(2):
        for key, tensor in sharded.state_dict().items():
            if key.endswith("weight_residual"):
                assert isinstance(tensor, DTensor), key
                assert torch.equal(whole(tensor), expected[key])
        merge_and_reinit(sharded)  # B = 0: the residuals stay the same


def adam_for(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)


def scheduled(model, optimizer=None):
    """A schedule with a restart at every step."""
    return ReLoRaSchedule(model, optimizer or adam_for(model), lambda t: 1.0, 1, 0)


def refused(error, says, work) -> None:
    try:
        work()
    except error as found:
        assert says in str(found), found
        return
    raise AssertionError(f"expected {error.__name__}: {says}")


def unsharded_parameters_are_put_back() -> None:
    """After a forward pass without a backward the root may hold whole parameters. They are resharded before any
    write."""
    model = fully_shard(build(torch.bfloat16), reshard_after_forward=False)
    x = torch.randn(6, 24)

    def evaluate():
        with torch.no_grad():
            model(x.bfloat16())
        return isinstance(model[0][0].weight, DTensor)

    optimizer = adam_for(model)
    assert not evaluate()
    schedule = scheduled(model, optimizer)
    for _, layer in relora_layers(model):
        local_rows(layer.lora_B.data)[0].fill_(1.0)
    before = whole(model[0][0].weight).clone()
    evaluate()
    assert schedule.step() and not torch.equal(whole(model[0][0].weight), before)
    evaluate()
    refused(TypeError, "got a DTensor", lambda: merge_and_unload(model))
    evaluate()
    refused(TypeError, "got a DTensor", lambda: save_adapter(model, "nowhere", "no_base"))
    assert len(relora_layers(model)) == 4


def placements_are_refused() -> None:
    """W sharded and the factors not, the other way round, or shards by columns: refused before any step."""
    if dist.get_world_size() == 1:
        return
    for of_w in (True, False):
        model = build()
        ignored = {p for _, m in relora_layers(model)
                   for p in ((m.weight,) if of_w else (m.lora_A, m.lora_B))}  # fmt: skip
        model = fully_shard(model, ignored_params=ignored)
        refused(ValueError, "of the same rows on a rank", lambda: scheduled(model))
        refused(ValueError, "of the same rows on a rank", lambda: merge_and_reinit(model))
    one_row = nn.Sequential(FusedReLoRaLinear(24, 1, r=2))  # rank 0 has it of both; all refuse
    fully_shard(one_row, ignored_params={one_row[0].weight})
    refused(ValueError, "of the same rows on a rank", lambda: scheduled(one_row))
    columns = nn.Sequential(FusedReLoRaLinear(24, 48, r=12))
    fully_shard(columns, shard_placement_fn=lambda p: Shard(p.dim() - 1))
    refused(ValueError, "sharded by rows over one mesh dimension", lambda: scheduled(columns))


def replicas_are_compared() -> None:
    """Rows over two ranks, in two replicas: a factor or a residual of the second replica differs."""
    if dist.get_world_size() != 4:
        return
    for key in ("lora_A", "weight_residual"):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "rows"))
        model = fully_shard(build(torch.bfloat16), mesh=mesh)
        schedule = scheduled(model)
        assert schedule.step()
        if dist.get_rank() == 3:
            local_rows(getattr(model[0][0], key).detach())[0][0, 0] += 1
        says = f"another 0.0: {key} on ranks [3] than on rank 1; nothing was merged"
        refused(RuntimeError, says, schedule.step)


def wide_weights_take_their_rows_of_a_residual() -> None:
    """The residual was made for the whole weight, before that was sharded."""
    model = build(torch.bfloat16)
    model.state_dict()
    for _, layer in relora_layers(model):
        layer.weight_residual.copy_(torch.arange(len(layer.weight))[:, None] / 256)
    alone = build(torch.bfloat16)
    alone.load_state_dict(model.state_dict())
    shard(model).float()
    for (_, a), (_, b) in zip(relora_layers(alone.float()), relora_layers(model)):
        assert torch.equal(whole(b.weight), a.weight)


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
    pruning_agrees()
    checkpoint_agrees()
    one_row_agrees()
    unsharded_parameters_are_put_back()
    placements_are_refused()
    replicas_are_compared()
    wide_weights_take_their_rows_of_a_residual()
    refusal_agrees()
    print(f"rank {dist.get_rank()} of {dist.get_world_size()} agrees")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(
        0
    )  # gloo's threads abort an ordinary exit now and then, after all is done (torch 2.13)
