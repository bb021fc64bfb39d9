"""bench/ablation.py and what it asks of relora-train: shared warm starts, diagnostics, bf16 factors."""

import csv
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

pytest.importorskip("transformers")

from train_runs import digest, flags, quick, words

from relora_kernels.train import cli, diagnostics
from relora_kernels.train.args import parse_args
from relora_kernels.train.output import RunFolder

_ = pytest.fixture(scope="module", autouse=True)(quick)
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
    # Once it has checkpoints of its own, a run no longer needs its donor.
    (RunFolder(taken).phase("relora") / "checkpoint-24").rename(tmp_path / "lost")
    (RunFolder(taken).config).write_text(
        RunFolder(taken).config.read_text().replace(str(donor), str(tmp_path / "gone"))
    )
    resumed = cli.main(["--resume", "--output_dir", str(taken)])
    assert resumed == 0 and digest(taken) == digest(own)


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
    # Updates are in units of the rate, and Adam's are about 1. Times the rate (0.01 at most) they would be below 0.1.
    assert 0.1 < statistics.median(updates.values()) < 3.0


@pytest.mark.parametrize("blocks", [4, 6, 8, 12, 24])
def test_merges_are_measured_on_several_projections(blocks, monkeypatch):
    layers = [SimpleNamespace(weight=torch.empty(1), place=i) for i in range(7 * blocks)]
    monkeypatch.setattr(diagnostics, "relora_layers", lambda _: [("", layer) for layer in layers])
    callback = diagnostics.DiagnosticCallback(SimpleNamespace(model=None))
    places = [layer.place for layer in callback._sample()]
    assert len(places) == 4 and len({place % 7 for place in places}) == 4


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


@pytest.fixture
def ablation(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import ablation

    return ablation


def test_a_run_takes_the_warm_start_of_its_own_kind(ablation):
    names = [name for grid in ablation.GRIDS.values() for name in grid]
    assert len(names) == len(set(names))
    donors = {name: ablation.donor_of(name) for name in names}
    assert donors["relora"] == donors["relora-r4"] == donors["relora-lr2"] == "lora"
    assert donors["upstream"] == donors["bf16-nearest"] == "bf16-compensated"
    none = {"lora", "bf16-compensated", "full-rank", "lora-from-scratch", "relora-from-scratch"}
    assert {name for name, donor in donors.items() if donor is None} == none


@pytest.mark.parametrize("rate", [["--learning_rate", "3e-3"], ["--learning_rate=3e-3"]])
def test_rates_are_multiples_of_the_one_that_is_given(ablation, monkeypatch, rate):
    monkeypatch.setattr(sys, "argv", ["ablation", *rate, "--lora_r", "16"])
    words = ablation.flags("relora-lr2", 0, ablation.parse_options())
    last = {word: value for word, value in zip(words, words[1:])}
    assert last["--learning_rate"] == 0.006 and last["--warm_start_learning_rate"] == 0.003
    assert last["--lora_r"] == "16" and last["--steps"] == 800


def tiny(text, **settings):
    """train_runs' settings as arguments for the driver, without those that the driver sets itself."""
    words = flags(text, "unused", **settings)
    own = {"--steps", "--output_dir", "--train_files"}
    pairs = [words[i : i + 2] for i in range(0, len(words), 2) if words[i] not in own]
    return [word for pair in pairs for word in pair]


def test_grid_is_run_once_and_reported(ablation, text, tmp_path, monkeypatch, capsys):
    output, more = tmp_path / "grid", tiny(text)
    arguments = ["ablation", "--output", str(output), "--seeds", "0", "--steps", "30", "--jobs", "1",
                 "--only", "lora", "relora", "--train_files", str(text)]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments + more)
    ablation.main()
    assert ablation.seeds_in(output) == [0]
    table = (output / "table.md").read_text()
    assert "| lora | 1 |" in table and "| relora | 1 |" in table
    with open(output / "runs.csv", newline="") as file:
        ends = {row["run"]: float(row["validation loss"]) for row in csv.DictReader(file)}
        file.seek(0)
        ranks = {row["run"]: row["entropy rank of the update"] for row in csv.DictReader(file)}
    for run, rank in ranks.items():  # as the run itself tells, over its 2 layers of 7 projections
        told = json.loads((output / f"{run}-0" / "summary.json").read_text())["update_rank"]
        assert float(rank) == pytest.approx(
            sum(p["relora"]["entropy_rank"] for p in told.values()) / 14, rel=1e-4
        )
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
    # Nor does it mistake them for runs with other options.
    monkeypatch.setattr(sys, "argv", [*arguments, *more, "--lora_r", "3"])
    with pytest.raises(SystemExit) as end:
        ablation.main()
    assert end.value.code == 2
    assert "lora-0: lora_r 4, these options: 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, named",
    [
        (["--lora_rank", "4"], "did you mean lora_r"),
        (["--seed", "3"], "got --seed"),  # --seeds is the driver's
        (["--output_dir=x"], "got --output_dir=x"),
        (["--preset", "60m"], "got --preset"),
        (["--steps", "100", "--warm_start_steps", "200"], "warm_start_steps <= steps"),
        (["--seeds", "0", "-1"], "expected --seeds from 0 to 2^32 - 1, got -1"),
        (["--output", __file__], "expected --output to be a folder"),
    ],
)
def test_bad_options_are_told_before_any_run(ablation, monkeypatch, capsys, words, named):
    monkeypatch.setattr(sys, "argv", ["ablation", *words])
    with pytest.raises(SystemExit) as end:
        ablation.parse_options()
    assert end.value.code == 2 and named in capsys.readouterr().err


@pytest.mark.parametrize("size", ["micro", "60m", "130m"])
def test_every_run_of_every_size_has_valid_flags(ablation, monkeypatch, tmp_path, size):
    """And apart from what defines a run, all have the same settings."""
    monkeypatch.setattr(sys, "argv", ["ablation", "--size", size, "--report"])
    options = ablation.parse_options()
    assert options.grid == list(ablation.GRIDS)
    runs = [(name, 0) for name in ablation.chosen(options.grid, None)]
    for name, seed in runs:
        args = parse_args([*map(str, ablation.flags(name, seed, options))])
        folder = tmp_path / f"{name}-{seed}"
        folder.mkdir()
        (folder / "config.yaml").write_text(args.to_yaml())
        (folder / "corpus.json").write_text('{"sha256": "0"}')
        (folder / "summary.json").write_text("{}")
    assert ablation.mixed(runs, tmp_path, options.base) == []
    folder = tmp_path / "relora-0"
    settings = yaml.safe_load((folder / "config.yaml").read_text()) | {"eval_tokens": 7}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    [line] = ablation.mixed(runs, tmp_path, None)
    assert line.startswith("relora-0: eval_tokens 7, full-rank-0: ")
    (folder / "summary.json").unlink()  # begun and never saved: it will be made anew
    assert ablation.mixed(runs, tmp_path, options.base) == []


def test_a_failed_run_stops_no_other_one(ablation, tmp_path, monkeypatch, capsys):
    """And a run that is named twice runs once."""
    started, reported = [], []

    def start(name, seed, options, output):
        started.append((name, seed))
        code = "raise SystemExit(3)" if name == "lora" else ""
        if name != "lora":
            (output / f"{name}-{seed}").mkdir()
            (output / f"{name}-{seed}" / "summary.json").write_text("{}")
        return subprocess.Popen([sys.executable, "-S", "-c", code])

    monkeypatch.setattr(ablation, "start", start)
    monkeypatch.setattr(ablation, "write_report", lambda output, runs: reported.extend(runs))
    monkeypatch.setattr(sys, "argv", ["ablation", "--output", str(tmp_path), "--seeds", "1", "1",
                                      "--only", "relora", "lora", "relora"])  # fmt: skip
    with pytest.raises(SystemExit, match="lora-1: exit 3, see .*lora-1.log"):
        ablation.main()
    assert started == [("lora", 1), ("relora", 1)] and reported == [("relora", 1)]
    assert "1 to do" in capsys.readouterr().out


def test_minutes_leave_time_to_save(ablation, tmp_path, monkeypatch, capsys):
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
    signals = []
    process = SimpleNamespace(poll=lambda: None, wait=lambda: 143,
                              send_signal=lambda n: signals.append((n, clock.now)))  # fmt: skip
    monkeypatch.setattr(ablation, "time", clock)
    monkeypatch.setattr(ablation, "start", lambda *_: process)
    monkeypatch.setattr(sys, "argv", ["ablation", "--minutes", "8", "--jobs", "1"])
    assert ablation.train_all([("lora", 0)], ablation.parse_options(), tmp_path) == []
    [(number, seconds)] = signals
    assert number == ablation.signal.SIGTERM and 420 < seconds < 450
    arguments = ["--output", str(tmp_path), "--seeds", "0", "1", "--only", "lora", "relora"]
    monkeypatch.setattr(sys, "argv", ["ablation", "--minutes", "8", *arguments])
    with pytest.raises(SystemExit) as end:
        ablation.main()
    assert end.value.code == ablation.LEFT == 3
    told = capsys.readouterr()
    assert told.out.endswith("4 to do: lora-0, relora-0, lora-1, relora-1\n")
    assert "8.0 minutes are over; call again" in told.err


@pytest.mark.parametrize(
    "option, says",
    [
        ("--jobs", "--jobs >= 1, got 0"),
        ("--minutes", "--minutes > 0, got 0.0"),
        ("--steps", "steps > 0"),
    ],
)
def test_nothing_to_do_it_with_is_refused(ablation, monkeypatch, capsys, option, says):
    monkeypatch.setattr(sys, "argv", ["ablation", option, "0"])
    with pytest.raises(SystemExit) as end:
        ablation.parse_options()
    assert end.value.code == 2
    assert says in capsys.readouterr().err


def test_jobs_is_how_many_train_at_once(ablation, tmp_path, monkeypatch):
    alive, most = set(), []

    def start(name, seed, *_):
        steps = iter([None, None, 0])  # alive for two looks
        process = SimpleNamespace(returncode=0, poll=lambda: look(process, next(steps)))
        alive.add(id(process))
        most.append(len(alive))
        return process

    def look(process, ended):
        if ended == 0:
            alive.discard(id(process))
        return ended

    monkeypatch.setattr(
        ablation, "time", SimpleNamespace(monotonic=lambda: 0, sleep=lambda _: None)
    )
    monkeypatch.setattr(ablation, "start", start)
    monkeypatch.setattr(sys, "argv", ["ablation", "--jobs", "3"])
    runs = [("lora", seed) for seed in range(7)]
    assert ablation.train_all(runs, ablation.parse_options(), tmp_path) == []
    assert len(most) == 7 and max(most) == 3


def test_figures_of_a_run_that_diverged(ablation):
    import ablation_report

    row = {"phase": "relora", "cycle": 1}
    rows = [
        {"step": 0, "cycle": 0, "eval_loss": 5.0},
        {"step": 6, "cycle": 0, "update": 9.0},
        {"step": 6, "cycle": 1, "restart": True},
        {"step": 6, "cycle": 1, "eval_loss": 4.0},
        *({**row, "step": step, "update": float(step)} for step in (8, 9)),
        {**row, "step": 12, "merge_kept": None},
        {**row, "step": 12, "eval_loss": None},  # NaN
    ]
    spectra = {"q_proj": [[1.0, 1.0, 0.0], [8.0, 0.0, 0.0]]}
    run = {"rows": rows, "summary": {"eval_loss_final": 4.0}, "spectra": spectra}
    found = ablation_report.figures(run)
    assert math.isnan(found["eval_loss_final"]) and math.isnan(found["merge_kept"])
    assert ablation_report.updates_after_restarts(rows) == [{2: 8.0, 3: 9.0}]
    assert found["largest_update"] == 9.0
    # Computed per layer: 2 and 1. Their mean spectrum has two values of unlike size.
    assert found["entropy_rank"] == pytest.approx(1.5) and found["rank_1_percent"] == 1.5
    table = ablation_report.table_row("lora", {"lora": {0: run | {"figures": found}}})
    assert table["validation loss"] == "nan, diverged at step 12"
    skipped = [{"step": step, "skipped": True} for step in (11, 12)]
    assert ablation_report.diverged_at([*rows, *skipped]) == 11
    assert ablation_report.diverged_at([*rows, *skipped, {"step": 13, "eval_loss": 4.0}]) is None
    well = run | {"rows": [*rows[:-1], {**row, "step": 12, "eval_loss": 3.5}]}
    found = {0: well | {"figures": ablation_report.figures(well)}, 1: run | {"figures": found}}
    table = ablation_report.table_row("lora", {"lora": found})
    assert table["validation loss"] == "nan, diverged at step 12" and "diverged_at" not in found[0]
    assert ablation_report.table_row("a", {"a": {0: found[0]}})["validation loss"] == "3.500"


def test_a_run_that_gave_up_is_over_and_has_its_row(ablation, text, tmp_path, monkeypatch, capsys):
    output = tmp_path / "grid"
    arguments = ["ablation", "--output", str(output), "--steps", "30", "--train_files", str(text),
                 "--only", "relora-from-scratch", *tiny(text, learning_rate=1e30)]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    ablation.main()
    folder = output / "relora-from-scratch-0"
    told = "expected finite gradients, got NaN or inf in 11 steps in a row up to step 13"
    assert told in Path(f"{folder}.log").read_text() and not (folder / "summary.json").exists()
    told = capsys.readouterr().out
    assert "relora-from-scratch-0: diverged" in told and told.endswith("0 to do\n")
    table = (output / "table.md").read_text()
    assert "| relora-from-scratch | 1 | nan, diverged at step 3 |" in table
    [row] = csv.DictReader((output / "runs.csv").read_text().splitlines())
    assert row["validation loss"] == "nan" and row["diverged at step"] == "3"
    monkeypatch.setattr(ablation, "start", None)  # nor is it tried again
    ablation.main()
    monkeypatch.setattr(sys, "argv", ["ablation", "--output", str(output), "--report"])
    ablation.main()
    # A run whose next step may succeed is not over.
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(x for x in lines if json.loads(x)["step"] < 13))
    assert not ablation.is_over(folder)
    with pytest.raises(SystemExit, match="no finished run"):
        ablation.main()


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_runs_save_and_end_when_the_driver_is_killed(text, tmp_path):
    output = tmp_path / "grid"
    folder, deadline = output / "full-rank-0", time.monotonic() + 90
    driver = subprocess.Popen(
        [sys.executable, BENCH / "ablation.py", "--output", output, "--steps", "5000", "--only",
         "full-rank", "--train_files", text, *tiny(text, save_every=5000, eval_every=5000)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not (folder / "metrics.jsonl").exists():
            assert time.monotonic() < deadline and driver.poll() is None
            time.sleep(0.05)
        [run] = Path(f"/proc/{driver.pid}/task/{driver.pid}/children").read_text().split()
    finally:
        driver.kill()
        driver.wait()
    stat = Path(f"/proc/{run}/stat")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, os.kill(int(run), signal.SIGKILL)
        time.sleep(0.05)
    assert len(list(folder.glob("checkpoint/warm_start/checkpoint-*"))) == 1
