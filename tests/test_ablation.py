"""bench/ablation.py and what it asks of relora-train: shared warm starts, diagnostics, bf16 factors."""

import csv
import json
import statistics
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from train_runs import digest, flags, one_thread, words

from relora_kernels.train import cli
from relora_kernels.train.output import RunFolder

_ = pytest.fixture(scope="module", autouse=True)(one_thread)
BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(words(1500), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def donor(text, tmp_path_factory):
    """Checkpoints do not fall on the end of the warm start by themselves: 6 is no multiple of 4."""
    out = tmp_path_factory.mktemp("donor") / "out"
    assert cli.main(flags(text, out, cycle_steps=100, diagnostics=True)) == 0
    return out


def test_a_taken_warm_start_is_as_good_as_an_own_one(text, donor, tmp_path):
    own, taken = tmp_path / "own", tmp_path / "taken"
    assert cli.main(flags(text, own)) == 0
    assert cli.main(flags(text, taken, warm_start_from=donor)) == 0
    assert digest(own) == digest(taken) != digest(donor)
    losses = [
        [(r["step"], r["loss"]) for r in RunFolder(o).rows() if "loss" in r] for o in (own, taken)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"warm_start_steps": 4}, "warm_start_steps: expected 4, got 6"),
        ({"seed": 3}, "seed: expected 3, got 0"),
        ({"learning_rate": 0.02}, "warm_start_learning_rate: expected 0.02, got 0.01"),
    ],
)
def test_a_warm_start_of_other_settings_is_refused(text, donor, tmp_path, capsys, changes, named):
    out = tmp_path / "out"
    assert cli.main(flags(text, out, warm_start_from=donor, **changes)) == 2
    assert named in capsys.readouterr().err and not out.exists()
    assert cli.main(flags(text, out, warm_start_from=tmp_path / "nothing")) == 2
    assert "--warm_start_from: expected the folder of a run" in capsys.readouterr().err


def test_diagnostics_tell_updates_and_what_merges_keep(text, tmp_path):
    out = tmp_path / "out"
    assert cli.main(flags(text, out, diagnostics=True, reset_mode="zero")) == 0
    rows = RunFolder(out).rows()
    kept = [row["merge_kept"] for row in rows if "merge_kept" in row]
    assert len(kept) == 3 and all(abs(k - 1) < 1e-5 for k in kept)  # float32 weights keep it all
    updates = {row["step"]: row["update"] for row in rows if "update" in row}
    # The first step of a cycle has a learning rate of 0.
    assert set(updates) == set(range(7, 31)) - {7, 13, 19, 25}
    # Adam's step is about the rate itself; times it (0.01 at most) these would be below 0.1.
    assert 0.1 < statistics.median(updates.values()) < 3.0


def test_bf16_factors_have_bf16_moments(text, tmp_path, monkeypatch):
    seen = set()

    def adamw(model, learning_rate, make=cli._adamw):
        seen.update(p.dtype for n, p in model.named_parameters() if "lora_" in n)
        return make(model, learning_rate)

    monkeypatch.setattr(cli, "_adamw", adamw)
    out = tmp_path / "out"
    assert (
        cli.main(flags(text, out, bf16=True, lora_dtype="bfloat16", merge_rounding="nearest")) == 0
    )
    assert seen == {torch.bfloat16}


def test_a_run_takes_the_warm_start_of_its_own_kind(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import ablation

    names = [name for grid in ablation.GRIDS.values() for name in grid]
    assert len(names) == len(set(names))
    donors = {name: ablation.donor_of(name) for name in names}
    assert donors["relora"] == donors["relora-r4"] == donors["relora-lr2"] == "lora"
    assert donors["upstream"] == donors["bf16-nearest"] == "bf16-compensated"
    none = {"lora", "bf16-compensated", "full-rank", "lora-from-scratch", "relora-from-scratch"}
    assert {name for name, donor in donors.items() if donor is None} == none


def test_rates_are_multiples_of_the_one_that_is_given(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import ablation

    monkeypatch.setattr(sys, "argv", ["ablation", "--learning_rate", "3e-3", "--lora_r", "16"])
    words = ablation.flags("relora-lr2", 0, ablation.parse_options())
    last = {word: value for word, value in zip(words, words[1:])}
    assert last["--learning_rate"] == 0.006 and last["--warm_start_learning_rate"] == 0.003
    assert last["--lora_r"] == "16" and last["--steps"] == 800


def test_grid_is_run_once_and_reported(text, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCH))
    import ablation

    tiny = flags(text, tmp_path / "unused")
    drop = {"--steps", "--output_dir", "--train_files"}
    pairs = [tiny[i : i + 2] for i in range(0, len(tiny), 2) if tiny[i] not in drop]
    more = [word for pair in pairs for word in pair]
    output = tmp_path / "grid"
    arguments = ["ablation", "--output", str(output), "--seeds", "0", "--steps", "30", "--jobs", "1",
                 "--only", "lora", "relora", "--train_files", str(text)]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments + more)
    ablation.main()
    table = (output / "table.md").read_text()
    assert "| lora | 1 |" in table and "| relora | 1 |" in table
    with open(output / "runs.csv", newline="") as file:
        ends = {row["run"]: float(row["validation loss"]) for row in csv.DictReader(file)}
    relora = next(line for line in table.splitlines() if line.startswith("| relora |"))
    assert f"| {ends['relora'] - ends['lora']:+.3f} |" in relora  # above lora
    for plot in ("validation", "updates", "spectrum"):
        assert (output / "plots" / f"{plot}.png").stat().st_size > 10_000
    # relora took the donor's warm start, and a second call finds nothing to do.
    settings = json.loads((output / "relora-0" / "summary.json").read_text())["settings"]
    assert settings["warm_start_from"] == str(output / "lora-0")
    monkeypatch.setattr(ablation, "start", None)
    ablation.main()
    assert "2 runs in" in capsys.readouterr().out
