"""relora-train with several processes (gloo on a CPU): DDP and FSDP2 equal one process, runs resume at
another world size, a problem on one rank is handled on all. Faults 5, 7 and 8 (see test_reliability.py)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
if not torch.distributed.is_available():
    pytest.skip("torch is built without distributed", allow_module_level=True)

from safetensors.torch import load_file
from train_runs import digest, flags, rows_to_compare, same_course, words

from relora_kernels.train import checkpoint, cli
from relora_kernels.train.output import RunFolder

# 4 steps of warm start, 14 of ReLoRA with restarts after 6 and 12; checkpoints there after 5, 10, 14.
RUN = {
    "num_layers": 1,
    "steps": 18,
    "warm_start_steps": 4,
    "save_every": 5,
    "eval_every": 9,
    "eval_tokens": 64,
    "reset_mode": "random",
    "reset_ratio": 0.5,
}


def torchrun(processes, cases, folder):
    (folder / "cases.json").write_text(json.dumps(cases))
    program = Path(__file__).with_name("distributed_program.py")
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(processes), program, folder / "cases.json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("is done") == processes
    return result.stderr


def interrupted(out, copy):
    """A copy of a finished run that has lost everything after its checkpoint at step 10 of 14."""
    shutil.copytree(out, copy)
    shutil.rmtree(copy / "final")
    shutil.rmtree(copy / "checkpoint/relora/checkpoint-14")
    return copy


def resume(out, **case):
    return {"out": str(out), "flags": ["--resume", "--output_dir", str(out)], **case}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every run of this file, in four launches: one process, then 4, 2 and 1 by torchrun."""
    base = tmp_path_factory.mktemp("distributed")
    text = base / "words.txt"
    text.write_text(words(600), encoding="utf-8")

    def new(name, code=0, **settings):
        out = base / name
        return {"out": str(out), "flags": flags(text, out, **{**RUN, **settings}), "code": code}

    import distributed_program

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "ReLoRaCallback", cli.ReLoRaCallback)  # run() replaces both
        patch.setattr(cli.report, "plot_metrics", cli.report.plot_metrics)
        assert distributed_program.run(new("one")) == 0
        assert distributed_program.run(new("one-bf16", bf16=True)) == 0
    unsharded = interrupted(base / "one", base / "one-to-four")
    full = {"sharding": "full"}
    torchrun(4, [
        new("four-full", **full),
        new("four-none"),
        resume(unsharded) | {"flags": [*resume(unsharded)["flags"], "--sharding", "full"]},
    ], base)  # fmt: skip
    four = interrupted(base / "four-full", base / "four-to-two")
    torchrun(2, [
        new("two-full", **full),
        new("two-none"),
        new("two-full-bf16", bf16=True, **full),
        resume(four),
        new("nan", **full) | {"nan_on": 1},
        new("whole", lora_dropout=0.1, **full),
        new("stopped", lora_dropout=0.1, code=143, **full) | {"stop_on": 1},
        resume(base / "stopped"),
        {"check": "other_factors_case42"},
        {"check": "other_residual_case42"},
        {"check": "other_layers"},
        {"check": "moments_of_zero_redundancy"},
        {"check": "best_model", "args": [str(base / "best")]},
        {"check": "another_step_case42"},
    ], base)  # fmt: skip
    two = interrupted(base / "two-full", base / "two-to-one")
    torchrun(1, [new("one-full", **full)], base)
    assert cli.main(["--resume", "--output_dir", str(two), "--sharding", "none"]) == 0
    return base


EQUAL = ["four-full", "four-none", "two-full", "two-none", "one-full"]
RESUMED = ["one-to-four", "four-to-two", "two-to-one"]


@pytest.mark.parametrize("name", EQUAL + RESUMED)
def test_weights_and_losses_are_the_single_process_s(runs, name):
    """Up to the order of summation."""
    check_equal(runs / "one", runs / name)


def check_equal(one, other, tolerance=1e-4):
    """`tolerance`: relative, of weights and gradients; losses are equal to 1e-4."""
    expected = load_file(one / "final/model.safetensors")
    for key, tensor in load_file(other / "final/model.safetensors").items():
        assert (tensor - expected[key]).norm() <= tolerance * expected[key].norm(), key
    for a, b in zip(rows_to_compare(one), rows_to_compare(other), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            rel = tolerance if key == "grad_norm" else 1e-4
            assert b[key] == (pytest.approx(value, rel=rel) if isinstance(value, float) else value)


def test_bf16_weights_are_the_single_process_s(runs):
    """W is bf16 and sharded, A and B fp32: half an ulp of bf16 apart at most."""
    check_equal(runs / "one-bf16", runs / "two-full-bf16", 2**-8)


@pytest.mark.parametrize("name", EQUAL)
def test_draws_are_the_single_process_s_fault_7(runs, name):
    """New factors and randomly pruned moments, bit for bit, at any world size and sharding."""
    for cycle in (1, 2):
        expected = load_file(runs / "one" / f"restart-{cycle}.safetensors")
        found = load_file(runs / name / f"restart-{cycle}.safetensors")
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            assert torch.equal(tensor, expected[key]), (cycle, key)


def test_checkpoints_hold_whole_tensors(runs):
    one, four = (runs / name / "checkpoint/relora/checkpoint-14" for name in ("one", "four-full"))
    for file in ("model.safetensors", "training.safetensors"):
        expected, found = load_file(one / file), load_file(four / file)
        assert {k: (v.shape, v.dtype) for k, v in found.items()} == {
            k: (v.shape, v.dtype) for k, v in expected.items()
        }
    assert checkpoint.problem(four) is None
    assert len(json.loads((four / "training.json").read_text())["dict"]) == 5


def test_nan_on_one_rank_skips_the_step_on_all_fault_5(runs):
    skipped = [row["step"] for row in RunFolder(runs / "nan").rows() if "skipped" in row]
    assert skipped == [7]
    weights = load_file(runs / "nan/final/model.safetensors")
    assert all(t.isfinite().all() for t in weights.values())
    lost = [row["step"] for row in RunFolder(runs / "nan").rows() if row.get("loss", 0) is None]
    assert lost == [7]  # one row has no loss, the next one has a number again


def test_a_signal_to_one_rank_stops_all_and_the_run_resumes_bit_for_bit_case40(runs):
    """Sharded, with dropout: each rank's generator is restored."""
    same_course(runs / "stopped", runs / "whole")
    assert digest(runs / "stopped") != digest(runs / "two-full")
