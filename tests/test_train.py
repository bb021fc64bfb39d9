"""relora-train: whole runs of a tiny model through main(), its folder, and the callbacks.

test_reliability.py explains the numbers of cases and faults.
"""

import dataclasses
import errno
import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("transformers")

from safetensors.torch import load_file
from train_runs import RESTARTS, digest, finished_run, flags, one_thread, poison, series, words
from transformers import LlamaForCausalLM, Trainer, TrainerState, TrainingArguments

from relora_kernels import (
    BackendUnavailable,
    ReLoRaConfig,
    ReLoRaSchedule,
    apply_relora,
    cosine_with_warmup,
)
from relora_kernels.model import relora_layers
from relora_kernels.train import ReLoRaCallback, SkipNonFiniteCallback, cli, data
from relora_kernels.train.args import parse_args
from relora_kernels.train.metrics import MetricsCallback
from relora_kernels.train.output import RunFolder

_ = pytest.fixture(scope="module", autouse=True)(one_thread)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(words(1500), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """A finished run with dropout: its folder, and the trained model's logits before the export."""
    return finished_run(text, tmp_path_factory.mktemp("run") / "out")


def test_bad_target_is_refused_before_the_warm_start(text, tmp_path, capsys):  # case 44
    assert cli.main(flags(text, tmp_path / "out", target_modules="query")) == 2
    assert "q_proj" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, says", [("cuda", "got cpu"), ("nonsense", "nonsense")])
def test_a_backend_that_cannot_serve_is_told_before_the_warm_start(
    text, tmp_path, capsys, monkeypatch, name, says
):
    monkeypatch.setenv("RELORA_KERNELS_BACKEND", name)
    assert cli.main(flags(text, tmp_path / "out")) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", ["merge_and_reinit", "reset_optimizer"])
def test_each_step_of_a_restart_is_tried_before_the_warm_start(
    text, tmp_path, capsys, monkeypatch, step
):
    def refused(*args, **kwargs):
        raise BackendUnavailable("expected what this machine lacks")

    monkeypatch.setattr(cli, step, refused)
    assert cli.main(flags(text, tmp_path / "out")) == 2
    assert "what this machine lacks" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_run_leaves_what_it_promises(finished, capsys):
    folder, *_ = finished
    summary = json.loads(folder.summary.read_text())
    assert summary["restarts"] == 3 and summary["steps"] == 30
    assert summary["tokens"] == 30 * 4 * 16
    assert summary["parameters"] > 0 and summary["trainable_parameters"] > 0
    assert len(summary["corpus_record"]["sha256"]) == 64
    assert summary["settings"] == yaml.safe_load(folder.config.read_text())
    assert len(summary["sample"]) > 0
    assert summary["eval_loss_final"] < summary["eval_loss_warm_start"] < summary["eval_loss_start"]
    for name in ("loss.png", "learning_rate.png"):
        png = (folder.plots / name).read_bytes()
        assert png.startswith(b"\x89PNG\r\n\x1a\n") and png.endswith(b"IEND\xaeB`\x82")
        assert len(png) > 10_000
    assert folder.last_checkpoint("relora").endswith("checkpoint-24")


def test_metrics_tell_steps_tokens_and_speed(finished):
    folder, *_ = finished
    rows = folder.rows()
    assert [s for s, _ in series(folder, "loss")] == list(range(1, 31))
    assert [s for s, _ in series(folder, "eval_loss")] == [0, 6, 12, 18, 24, 30]
    assert all(r["tokens"] == r["step"] * 64 for r in rows)
    assert all(r["tokens_per_second"] > 0 and r["peak_memory"] > 0 for r in rows if "loss" in r)
    cycles = [r["cycle"] for r in rows if "loss" in r]
    assert cycles == [None] * 6 + [0] * 5 + [1] * 6 + [2] * 6 + [3] * 7
    assert [r["step"] for r in rows if "restart" in r] == RESTARTS


def test_learning_rate_is_jagged(finished):
    """The paper's formula, written out; step t of a phase is taken with f(t - 1)."""

    def cosine(t, total):
        return t / 2 if t < 2 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (t - 2) / (total - 2)))

    def jagged(t):
        k, since = divmod(t, 6)
        return since / 2 * cosine(6 * k + 2, 24) if k and since < 2 else cosine(t, 24)

    folder, *_ = finished
    expected = [cosine(t, 30) for t in range(6)] + [jagged(t) for t in range(24)]
    got = [r["lr"] for r in folder.rows() if "loss" in r]
    assert got == pytest.approx([0.01 * f for f in expected], abs=1e-12)
    assert [r["lr"] for r in folder.rows() if "restart" in r] == [0, 0, 0]


def test_weights_are_frozen_between_merges_and_change_in_each(finished):
    *_, seen = finished
    assert len(seen) == 24
    for step, (frozen, all_merged, B_zero) in enumerate(seen, start=7):
        assert frozen
        assert all_merged == (step in RESTARTS)
        # the first step after a restart is taken with the rate 0
        assert B_zero == (step in RESTARTS or step - 1 in (6, *RESTARTS))


def test_merged_checkpoint_is_an_ordinary_one(finished):
    folder, ids, trained, _ = finished
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert tokenizer.decode(tokenizer('a b c.')['input_ids']) == 'a b c.'\n"
        "assert not any(name.startswith('relora') for name in sys.modules)\n"
        "torch.save(model(torch.arange(32).reshape(2, 16)).logits, sys.argv[2])\n"
    )
    result = folder.root / "logits.pt"
    subprocess.run([sys.executable, "-c", code, folder.final, result], check=True)
    loaded = torch.load(result, weights_only=True)
    assert (loaded - trained).abs().max() <= 1e-5 * trained.abs().max()


def test_full_rank_and_relora_from_scratch(text, tmp_path):
    full, scratch = tmp_path / "full", tmp_path / "scratch"
    assert cli.main(flags(text, full, steps=8, warm_start_steps=8, save_every=8)) == 0
    assert cli.main(flags(text, scratch, steps=8, warm_start_steps=0, save_every=8)) == 0
    assert json.loads((full / "summary.json").read_text())["restarts"] == 0
    assert [s for s, _ in series(RunFolder(scratch), "restart")] == [6]


# --- the folder --------------------------------------------------------------------------------


def test_a_folder_with_files_is_refused_untouched(text, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert cli.main(flags(text, tmp_path)) == 2
    assert "to be new or empty" in capsys.readouterr().err
    assert cli.main([*flags(text, tmp_path), "--overwrite"]) == 2
    assert "expected an earlier run" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    assert cli.main(flags(text, tmp_path / "thesis.txt")) == 2
    assert "to be a folder, got the file" in capsys.readouterr().err


def test_overwrite_deletes_the_run_and_nothing_else(finished, tmp_path):
    folder = RunFolder(shutil.copytree(finished[0].root, tmp_path / "out"))
    (folder.root / "thesis.txt").write_text("mine")
    folder.check(resume=False, overwrite=True)
    folder.create()
    assert (folder.root / "thesis.txt").read_text() == "mine"
    left = {p.name for p in folder.root.iterdir()} - {"logits.pt"}
    assert left == {"thesis.txt", "run.lock", "corpus.json"}


@pytest.mark.parametrize("foreign", ["checkpoint/precious", "plots/mine.png", "final/x"])
def test_overwrite_keeps_what_no_run_writes(finished, tmp_path, foreign):
    folder = RunFolder(shutil.copytree(finished[0].root, tmp_path / "out"))
    (folder.root / foreign).write_text("mine")
    if foreign.startswith("final"):  # the export replaces that folder
        with pytest.raises(ValueError, match="final/x: move it away; nothing was deleted"):
            folder.check(resume=False, overwrite=True)
    else:
        folder.check(resume=False, overwrite=True)
        folder.create()
    assert (folder.root / foreign).read_text() == "mine"
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "config.yaml").write_text("a: 1")
    with pytest.raises(ValueError, match="nothing was deleted"):
        RunFolder(stranger).check(resume=False, overwrite=True)


@pytest.mark.parametrize("unlinks", [0, 3, 10**6])
def test_a_killed_overwrite_can_be_repeated(finished, tmp_path, unlinks, monkeypatch):
    folder = RunFolder(shutil.copytree(finished[0].root, tmp_path / "out"))
    (folder.root / "thesis.txt").write_text("mine")
    left, unlink = [unlinks], Path.unlink

    def killed(path, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        unlink(path, **kwargs)

    def killed_among_folders(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        patch.setattr(Path, "rmdir", killed_among_folders)
        with pytest.raises(KeyboardInterrupt):
            folder.create()
    folder.check(resume=False, overwrite=True)
    folder.create()
    names = {path.name for path in folder.root.iterdir()} - {"run.lock", "logits.pt"}
    assert names == {"corpus.json", "thesis.txt"}


def test_a_folder_in_which_another_process_trains_is_refused(finished, tmp_path, text, capsys):
    folder = RunFolder(shutil.copytree(finished[0].root, tmp_path / "out"))
    before = {path: path.read_bytes() for path in folder.root.rglob("*") if path.is_file()}
    folder.lock()
    for command in (
        ["--resume", "--output_dir", str(folder.root)],
        [*flags(text, folder.root), "--overwrite"],
    ):
        assert cli.main(command) == 2
        assert "no other process to train in" in capsys.readouterr().err
    before[folder.lock_file] = b""
    assert before == {path: path.read_bytes() for path in folder.root.rglob("*") if path.is_file()}
    folder.close()
    folder.lock()
    folder.close()


def test_a_file_system_without_locks_is_told_of_and_used(tmp_path, capsys, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    folder = RunFolder(tmp_path / "out")
    folder.lock()
    folder.close()
    assert "cannot be locked ([Errno 37] No locks available)" in capsys.readouterr().out


def test_a_diverged_run_ends_with_its_summary(text, tmp_path):
    """The validation loss at the end of the warm start is not a number, and the summary records it as None."""
    out = tmp_path / "out"
    options = {"steps": 8, "warm_start_steps": 8, "warm_start_learning_rate": 1e30, "eval_every": 4}
    assert cli.main(flags(text, out, **options)) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["eval_loss_start"] > 0 and summary["sample"] is None
    assert summary["eval_loss_final"] is None and summary["eval_loss_warm_start"] is None


def test_autocast_is_what_the_settings_say(text, tmp_path, monkeypatch, finished):
    """Not what accelerate launch --mixed_precision puts into the environment."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    options = {"steps": 2, "warm_start_steps": 0, "warmup_steps": 1}
    assert cli.main(flags(text, tmp_path / "a", **options)) == 0
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert cli.main(flags(text, tmp_path / "b", **options)) == 0
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_a_sample_that_the_terminal_cannot_show_ends_no_run(text, tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(cli.report, "sample_text", lambda *_: "\N{SNOWMAN}")
    options = {"steps": 2, "warm_start_steps": 0, "warmup_steps": 1}
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        assert cli.main(flags(text, tmp_path / "out", **options)) == 0
    terminal.flush()
    assert b"\\u2603" in terminal.buffer.getvalue()


# --- callbacks in a user's own Trainer -----------------------------------------------------------


def tiny_trainer(tmp_path, model, optimizers, callbacks, steps=4):
    rows = np.random.default_rng(0).integers(0, 256, (64, 16))
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(
        model=model,
        args=args,
        train_dataset=data.Blocks(rows, 0, 64, seed=0),
        optimizers=optimizers,
        callbacks=callbacks,
    )


@pytest.fixture
def relora(text):
    torch.manual_seed(0)
    args = dataclasses.replace(parse_args([]), hidden_size=16, num_layers=1, num_heads=2)
    tokenizer = data.train_tokenizer([words(50)], 300)
    run = cli.Run.__new__(cli.Run)
    run.args, run.tokenizer = args, tokenizer
    model = apply_relora(LlamaForCausalLM(run._llama_config()), ReLoRaConfig(r=4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    schedule = ReLoRaSchedule(model, optimizer, cosine_with_warmup(1, 8), 2, 1)
    return model, optimizer, schedule


def test_callback_wants_the_schedules_learning_rate(relora, tmp_path):
    model, optimizer, schedule = relora
    trainer = tiny_trainer(tmp_path, model, (optimizer, None), [ReLoRaCallback(schedule)])
    with pytest.raises(ValueError, match="expected the Trainer to step schedule.lr_scheduler"):
        trainer.train()


def test_callback_wants_the_schedules_optimizer(relora, tmp_path):
    model, optimizer, schedule = relora
    for own in (None, torch.optim.AdamW(optimizer.param_groups[0]["params"], 1e-3)):
        pair = (own, schedule.lr_scheduler)
        trainer = tiny_trainer(tmp_path, model, pair, [ReLoRaCallback(schedule)])
        with pytest.raises(ValueError, match="schedule.optimizer, .* got another AdamW"):
            trainer.train()


def test_callback_takes_a_wrapped_optimizer(relora, tmp_path):
    model, optimizer, schedule = relora

    class Wrapping(torch.optim.Optimizer):
        def __init__(self):
            super().__init__(optimizer.param_groups, optimizer.defaults)
            self.optimizer, self.state = optimizer, optimizer.state
            self.param_groups = optimizer.param_groups

        def step(self, closure=None):
            optimizer.step()

    wrapping = Wrapping()
    schedule = ReLoRaSchedule(model, wrapping, cosine_with_warmup(1, 8), 2, 1)
    pair = (wrapping, schedule.lr_scheduler)
    tiny_trainer(tmp_path, model, pair, [ReLoRaCallback(schedule)], steps=3).train()
    assert schedule.cycle == 1 and optimizer.state


def test_callback_restarts_in_another_trainer(relora, tmp_path):
    model, optimizer, schedule = relora
    pair = (optimizer, schedule.lr_scheduler)
    tiny_trainer(tmp_path, model, pair, [ReLoRaCallback(schedule)], steps=5).train()
    assert schedule.cycle == 2
    assert all(int(layer.merge_count) == 2 for _, layer in relora_layers(model))


def test_deepspeed_and_the_first_fsdp_are_refused_by_name(
    relora, monkeypatch, text, tmp_path, capsys
):
    model, optimizer, schedule = relora
    callback, lr = ReLoRaCallback(schedule), {"lr_scheduler": schedule.lr_scheduler}
    engine = type("DeepSpeedEngine", (), {"__module__": "deepspeed.runtime.engine"})()
    with pytest.raises(TypeError, match="DeepSpeedEngine.*fully_shard"):
        callback.on_train_begin(None, None, None, model=engine, optimizer=optimizer, **lr)
    args = type("Args", (), {"deepspeed": {"zero_optimization": {}}})()
    with pytest.raises(TypeError, match="without deepspeed.*fsdp_version"):
        callback.on_train_begin(args, None, None, model=model, optimizer=optimizer, **lr)
    flat = torch.nn.Sequential(type("FullyShardedDataParallel", (torch.nn.Module,), {})())
    with pytest.raises(ValueError, match="FSDP's second version"):
        callback.on_train_begin(None, None, None, model=flat, optimizer=optimizer, **lr)
    for other in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        with monkeypatch.context() as patch:
            patch.setenv(other, "true")
            assert cli.main(flags(text, tmp_path / "out")) == 2
        assert f"expected no {other}" in capsys.readouterr().err


def test_tensorboard_marks_the_restarts(finished):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, *_ = finished
    events = accumulator.EventAccumulator(str(folder.tensorboard))
    events.Reload()
    marks = events.Scalars("relora/restart")
    assert [m.step for m in marks if m.value == 1] == RESTARTS
    assert {m.step for m in marks if m.value == 0} == set(range(7, 31)) - set(RESTARTS)
    texts = events.Tensors("restarts/text_summary")
    assert [t.step for t in texts] == RESTARTS
    assert b"step 12: merged, A and B start anew, cycle 1" in texts[0].tensor_proto.string_val[0]
    assert [e.step for e in events.Scalars("relora/loss")] == list(range(7, 31))


def test_a_failing_sink_is_told_once(relora, tmp_path, caplog):  # case 47
    def broken(row):
        raise OSError("disk full")

    model, optimizer, schedule = relora
    rows = []
    metrics = MetricsCallback([broken, rows.append], "relora", 0, 32, schedule=schedule)
    callbacks = [ReLoRaCallback(schedule), metrics]
    tiny_trainer(tmp_path, model, (optimizer, schedule.lr_scheduler), callbacks).train()
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3, 4]
    assert caplog.text.count("metrics are being lost") == 1


# --- gradients that are not finite -------------------------------------------------------------


def test_steps_with_nan_gradients_are_skipped_and_counted_case41_fault_5(
    text, tmp_path, monkeypatch
):
    """Clipping must not hide NaN gradients from the callback that skips the step; parameters stay unchanged."""
    poison(monkeypatch, {5, 22, 24})  # steps 3, 12 and 13; 12 is a restart

    class Spy(SkipNonFiniteCallback):
        unchanged = []

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            self.before = [p.detach().clone() for p in model.parameters()]
            self.skipped_before = self.skipped

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            super().on_pre_optimizer_step(args, state, control, model=model, **kwargs)
            self.skips = self.skipped > self.skipped_before

        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if self.skips:
                Spy.unchanged.append(all(map(torch.equal, self.before, model.parameters())))

    monkeypatch.setattr(cli, "SkipNonFiniteCallback", Spy)
    assert cli.main(flags(text, tmp_path / "out")) == 0
    folder = RunFolder(tmp_path / "out")
    assert Spy.unchanged == [True] * 3
    assert json.loads(folder.summary.read_text())["skipped_steps"] == 3
    assert [step for step, _ in series(folder, "restart")] == RESTARTS
    rows = [json.loads(line, parse_constant=pytest.fail) for line in folder.metrics.open()]
    assert [r["step"] for r in rows if "grad_norm" in r and r["grad_norm"] is None] == [3, 12, 13]
    assert all(np.isfinite(loss) for _, loss in series(folder, "eval_loss"))


def test_too_many_nan_gradients_end_the_run_with_clean_weights_case41(
    text, tmp_path, monkeypatch, capsys
):
    poison(monkeypatch, range(12, 10**6))  # from step 7 on
    assert cli.main(flags(text, tmp_path / "out")) == 1
    assert "11 steps in a row up to step" in capsys.readouterr().err
    checkpoint = RunFolder(tmp_path / "out").last_checkpoint("relora")
    weights = load_file(f"{checkpoint}/model.safetensors")
    assert all(t.isfinite().all() for t in weights.values() if t.is_floating_point())


def test_a_gradient_scaler_skips_the_step_itself_and_scales_less_case41():
    model, guard = torch.nn.Linear(2, 1), SkipNonFiniteCallback()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=4.0)  # like Accelerate's
    before = model.weight.clone()
    scaler.scale(model(torch.ones(1, 2)).sum() * torch.inf).backward()
    guard.on_pre_optimizer_step(None, TrainerState(), None, model=model, optimizer=optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert guard.skipped == 1 and torch.equal(model.weight, before)
    assert scaler.get_scale() == 2.0
