"""Resume bit for bit, checkpoints that survive a kill, signals. test_reliability.py explains the numbers of cases
and faults."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("transformers")

from train_runs import (
    ODD_INTERVALS,
    RESTARTS,
    TINY,
    finished_run,
    flags,
    poison,
    quick,
    same_course,
    series,
    words,
)
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import relora_kernels
from relora_kernels import ReLoRaConfig, ReLoRaSchedule, apply_relora, cosine_with_warmup
from relora_kernels.train import (
    ReLoRaCallback,
    ReLoRaTrainer,
    SkipNonFiniteCallback,
    StopOnSignalCallback,
    checkpoint,
    cli,
    data,
)
from relora_kernels.train import trainer as trainer_module
from relora_kernels.train.args import parse_args
from relora_kernels.train.metrics import json_lines
from relora_kernels.train.output import RunFolder

_ = pytest.fixture(scope="module", autouse=True)(quick)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(words(1500), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """A finished run with dropout."""
    return finished_run(text, tmp_path_factory.mktemp("run") / "out")[0].root


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of that run, without the export."""
    out = shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(out / "final")
    return out


def resume(out, *more):
    return cli.main(["--resume", "--output_dir", str(out), *more])


# --- killed processes --------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked to be killed")
@pytest.mark.parametrize(
    ("first", "last", "more"), [(0, 10, []), (10, 20, ["--bf16", "true"])], ids=["fp32", "bf16"]
)
def test_a_run_killed_anywhere_resumes_bit_for_bit_case31_case39(first, last, more, tmp_path):
    """Twenty random points, ten per dtype: in steps, in restarts, in saving, in the export."""
    (tmp_path / "words.txt").write_text(words(600))
    program = Path(__file__).with_name("kill_program.py")
    result = subprocess.run(
        [sys.executable, program, tmp_path, str(first), str(last), "7", *more],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    points = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(points) == last - first, result.stderr
    for point in points:
        assert point["killed"] and point["resumed"] == 0, point
        assert point["same_weights"] and point["same_rows"] and not point["left_over"], point


@pytest.mark.parametrize(
    "lost",
    [[], ["relora/checkpoint-24"], ["relora"], ["relora", "warm_start/checkpoint-6"]],
    ids=["before the export", "in ReLoRA", "between the phases", "in the warm start"],
)
def test_resume_equals_an_uninterrupted_run(finished, copy, lost):
    for path in lost:
        shutil.rmtree(copy / "checkpoint" / path)
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "relora", "step"')  # a killed process's last line
    assert resume(copy) == 0
    same_course(copy, finished)


def test_a_run_without_a_checkpoint_yet_starts_from_the_first_step(finished, copy, capsys):
    shutil.rmtree(copy / "checkpoint")
    assert resume(copy) == 0
    assert "yet: starting from the first step" in capsys.readouterr().out
    same_course(copy, finished)


def test_bf16_run_resumes_with_its_residuals_and_repeats(text, tmp_path):
    out = tmp_path / "out"
    assert cli.main(flags(text, out, bf16=True)) == 0
    again = shutil.copytree(out, tmp_path / "again")
    shutil.rmtree(again / "checkpoint/relora/checkpoint-24")
    assert resume(again) == 0
    same_course(again, out)
    assert [s for s, _ in series(RunFolder(out), "restart")] == RESTARTS
    model = LlamaForCausalLM.from_pretrained(out / "final")
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())  # residual and B A are in it


# --- damaged checkpoints -----------------------------------------------------------------------


def flip_a_bit(path):
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


DAMAGE = {
    "truncated": ("model.safetensors", lambda p: os.truncate(p, p.stat().st_size // 2)),
    "bit flipped": ("training.safetensors", flip_a_bit),
    "missing": ("trainer_state.json", Path.unlink),
    "manifest missing": ("manifest.json", Path.unlink),
    "manifest cut": ("manifest.json", lambda p: os.truncate(p, 40)),
    "manifest of another kind": ("manifest.json", lambda p: p.write_text("[1]")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_in_one_line_case33_case34(copy, caplog, damage):
    phase = copy / "checkpoint/relora"
    name, spoil = DAMAGE[damage]
    spoil(phase / "checkpoint-24" / name)
    assert RunFolder(copy).last_checkpoint("relora") == str(phase / "checkpoint-20")
    [line] = caplog.messages
    assert line.startswith(f"passing over {phase / 'checkpoint-24'}: {name}")


def test_a_run_resumes_past_a_damaged_checkpoint_and_replaces_it(finished, copy):
    damaged = copy / "checkpoint/relora/checkpoint-24"
    flip_a_bit(damaged / "model.safetensors")
    assert resume(copy) == 0
    same_course(copy, finished)
    assert checkpoint.problem(damaged) is None


def test_damaged_checkpoints_alone_are_refused(copy, capsys):
    for path in (copy / "checkpoint").glob("*/checkpoint-*/manifest.json"):
        path.unlink()
    assert resume(copy) == 2
    assert "expected a valid checkpoint in" in capsys.readouterr().err


@contextmanager
def file_limit(size):
    """The system refuses to write a file past `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full_disk(monkeypatch, calls):
    """In these calls of save_file only half of the file can be written."""
    numbers = iter(range(10**6))

    def save_file(tensors, path, metadata, save=checkpoint.save_file):
        if next(numbers) not in calls:
            return save(tensors, path, metadata)
        with file_limit(sum(t.nbytes for t in tensors.values()) // 2):
            save(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", save_file)


def test_a_full_disk_costs_a_checkpoint_and_no_step_case32(
    text, finished, tmp_path, monkeypatch, caplog
):
    """It hits the first file of the checkpoint at ReLoRA's step 16, and the second file of the one at step 20."""
    full_disk(monkeypatch, {10, 12})
    out = tmp_path / "out"
    assert cli.main(flags(text, out, lora_dropout=0.1)) == 0
    same_course(out, finished)
    assert caplog.text.count("File too large") == 2
    left = sorted(p.name for p in (out / "checkpoint/relora").iterdir())
    assert left == ["checkpoint-12", "checkpoint-24"]
    assert checkpoint.last_valid(out / "checkpoint/relora").name == "checkpoint-24"


def test_a_disk_full_at_the_export_is_told_and_resumed_case32(copy, finished, monkeypatch, capsys):
    def save_pretrained(model, folder, save=LlamaForCausalLM.save_pretrained):
        with file_limit(2000):
            save(model, folder)

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", save_pretrained)
        assert resume(copy) == 1
    assert "File too large" in capsys.readouterr().err and not (copy / "final").exists()
    assert resume(copy) == 0
    same_course(copy, finished)


def test_a_row_that_the_disk_cannot_take_leaves_no_half_of_it_case32(tmp_path):
    write = json_lines(tmp_path / "metrics.jsonl")
    write({"step": 1})
    with file_limit(18), pytest.raises(OSError):
        write({"step": 2})
    write({"step": 3})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 3}\n'


# --- signals -----------------------------------------------------------------------------------


def signal_at(monkeypatch, number, steps):
    """The signal arrives in these optimizer steps, counted from the first of the process."""
    taken = iter(range(1, 10**6))

    def step(optimizer, *args, take=torch.optim.AdamW.step, **kwargs):
        if next(taken) in steps:
            signal.raise_signal(number)
        return take(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


@pytest.mark.parametrize(
    ("number", "step", "code"),
    [(signal.SIGTERM, 3, 143), (signal.SIGINT, 13, 130), (signal.SIGTERM, 18, 143)],
    ids=["in the warm start", "in ReLoRA", "at a restart"],
)
def test_a_signal_saves_and_ends_the_run_case40(
    text, tmp_path, monkeypatch, caplog, number, step, code, odd_run
):
    before = signal.getsignal(number)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        signal_at(patch, number, {step})
        with pytest.raises(SystemExit) as end:
            cli.main(flags(text, out, **ODD_INTERVALS))
    assert end.value.code == code and signal.getsignal(number) is before
    assert f"stopped by {number.name} after step {step}; resume to go on" in caplog.text
    assert not (out / "final").exists()
    assert resume(out) == 0
    same_course(out, odd_run)


@pytest.fixture(scope="module")
def odd_run(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("odd") / "out"
    assert cli.main(flags(text, out, **ODD_INTERVALS)) == 0
    return out


def test_a_signal_with_a_full_disk_says_that_nothing_was_saved(text, tmp_path, monkeypatch, capsys):
    full_disk(monkeypatch, {4})
    signal_at(monkeypatch, signal.SIGTERM, {9})
    assert cli.main(flags(text, tmp_path / "out")) == 1
    assert "could not be written: the run stops at an earlier checkpoint" in capsys.readouterr().err
    assert not list((tmp_path / "out/checkpoint").glob("*/tmp-*"))


def test_a_second_signal_is_as_before_training_but_not_the_same_one_twice(capfd):
    got = []
    before = signal.signal(signal.SIGTERM, lambda *_: got.append("before"))
    try:
        stop = StopOnSignalCallback()
        stop.on_train_begin(None, None, None)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # forwarded by a launcher
        assert got == [] and capfd.readouterr().err.count("finishing the step") == 1
        stop.received_at -= 60
        signal.raise_signal(signal.SIGTERM)
        assert got == ["before"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_skipped_steps_are_counted_over_a_resume_fault_6(text, tmp_path, monkeypatch, capsys):
    """Eleven in a row end the run, five before the signal and six after; the last checkpoint is valid."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        poison(patch, range(2 * 8, 10**6))
        signal_at(patch, signal.SIGTERM, {13})
        with pytest.raises(SystemExit):
            cli.main(flags(text, out))
    with monkeypatch.context() as patch:
        poison(patch, range(10**6))
        assert resume(out) == 1
    assert (
        "11 steps in a row up to step 19; the weights are those of step 8"
        in capsys.readouterr().err
    )
    last = checkpoint.last_valid(out / "checkpoint/relora")
    assert last.name == "checkpoint-13"
    tensors = checkpoint.load_tensors(last / "model.safetensors")
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())
    assert resume(out) == 0  # with good gradients it goes on
    assert json.loads((out / "summary.json").read_text())["skipped_steps"] == 11


# --- what must match -----------------------------------------------------------------------------


def test_resume_refuses_other_settings_and_another_corpus_case38(copy, tmp_path, capsys):
    with pytest.raises(SystemExit):
        resume(copy, "--lora_r", "8")
    assert "expected lora_r 4, got 8" in capsys.readouterr().err
    other = tmp_path / "other.txt"
    other.write_text(words(1500, seed=1))
    config = yaml.safe_load((copy / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump(config | {"train_files": [str(other)]}))
    before = (copy / "metrics.jsonl").read_bytes()
    assert resume(copy) == 2
    assert "--resume: expected the corpus" in capsys.readouterr().err
    assert (copy / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("lora_r", 8, "relora.r: expected 4, got 8"),
        ("target_modules", ["q_proj", "o_proj"], "relora.layers: expected also model.layers.0."),
        ("seed", 1, "seed: expected 0, got 1"),
        ("batch_size", 8, "batch_size: expected 4, got 8"),
        ("cycle_steps", 8, "schedule.restart_every: expected 6, got 8"),
        ("bf16", True, "relora.weight_dtype: expected torch.float32, got torch.bfloat16"),
        ("reset_mode", "random", "schedule.reset_mode: expected magnitude, got random"),
    ],
)
def test_the_checkpoint_itself_refuses_another_run_case38(copy, setting, value, message, capsys):
    config = yaml.safe_load((copy / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump(config | {setting: value}))
    assert resume(copy) == 2
    assert message in capsys.readouterr().err


def test_a_tokenizer_that_gives_other_tokens_is_refused_case38(copy, monkeypatch, capsys):
    """The corpus and the vocabulary's size are the same; for example, a later version of the tokenizer."""

    def other(args, corpus, tokenizer):
        train, validation = data.training_blocks(args, corpus, tokenizer)
        return train[:, ::-1], validation

    monkeypatch.setattr(cli, "training_blocks", other)
    assert resume(copy) == 2
    assert "is of another run: tokens: expected" in capsys.readouterr().err


def test_resume_finds_its_folder_through_the_yaml_file(finished, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"output_dir: {finished}\nresume: true\nlearning_rate: 0.5\n")
    with pytest.raises(SystemExit):
        parse_args(["--config", str(config)])
    config.write_text(f"output_dir: {finished}\n")
    assert parse_args(["--config", str(config), "--resume"]).learning_rate == TINY["learning_rate"]


def test_resume_needs_a_run(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("")
    assert resume(tmp_path) == 2
    assert "--resume: expected a run in" in capsys.readouterr().err


# --- no pickle -----------------------------------------------------------------------------------


def test_nothing_is_pickled_or_unpickled_case35(copy, finished, monkeypatch):
    class Malicious:
        def __reduce__(self):
            return (os.mkdir, (str(copy / "owned"),))

    names = {p.name for p in finished.rglob("*") if p.is_file()}
    assert not {n for n in names if n.endswith((".pt", ".pth", ".bin", ".pkl"))}
    shutil.rmtree(copy / "checkpoint/relora/checkpoint-24")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save(Malicious(), copy / "checkpoint/relora/checkpoint-20" / name)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    assert resume(copy) == 0
    same_course(copy, finished)
    assert not (copy / "owned").exists()
    for path in Path(relora_kernels.__file__).parent.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert "torch.load" not in source and "import pickle" not in source, path


# --- the pieces ----------------------------------------------------------------------------------


def test_trees_come_back_as_they_were_and_others_are_refused():
    tree = {
        "a": [1, 2.5, None, True, "x", float("inf")],
        1: (torch.arange(3), np.arange(2, dtype=np.uint32)),
        "nested": {"b": {"c": torch.tensor(0.1, dtype=torch.float64)}},
    }
    tensors = {}
    text = json.dumps(checkpoint.pack(tree, tensors))
    back = checkpoint.unpack(json.loads(text), tensors)
    assert back["a"] == tree["a"] and isinstance(back[1], tuple)
    assert torch.equal(back[1][0], tree[1][0]) and back[1][1].dtype == np.uint32
    assert torch.equal(back["nested"]["b"]["c"], tree["nested"]["b"]["c"])
    with pytest.raises(TypeError, match="got object at a.1"):
        checkpoint.pack({"a": [0, object()]}, {})


def test_tied_and_strided_tensors_are_saved_as_they_are_case36_case37(tmp_path):
    table = torch.randn(6, 4)
    tensors = {
        "tied": table,
        "tied again": table,
        "transposed": table.T,
        "part": table[2:4],
        "expanded": torch.ones(1, 3).expand(5, 3),
        "empty": torch.zeros(0, 3),
        "narrow": table.bfloat16(),
    }
    checkpoint.save_tensors(tmp_path / "x.safetensors", tensors)
    back = checkpoint.load_tensors(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype, name
    assert (tmp_path / "x.safetensors").stat().st_size < 1500  # the tied tensor is stored once


def test_a_failed_write_leaves_the_earlier_checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-3"
    checkpoint.write(folder, lambda f: (f / "a").write_text("first"), {})

    def fail(temporary):
        (temporary / "a").write_text("second")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(folder, fail, {})
    assert (folder / "a").read_text() == "first" and checkpoint.problem(folder) is None
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


def test_old_checkpoints_go_damaged_ones_first_and_no_others(tmp_path):
    for n in (1, 2, 3, 4, 9):
        checkpoint.write(tmp_path / f"checkpoint-{n}", lambda f: (f / "a").write_text("x"), {})
    (tmp_path / "checkpoint-3/a").unlink()
    (tmp_path / "notes").mkdir()
    checkpoint.delete_old(tmp_path / "checkpoint-4", 2, str(tmp_path / "checkpoint-1"))
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["checkpoint-1", "checkpoint-2", "checkpoint-4", "checkpoint-9", "notes"]


# --- ReLoRaTrainer in one's own script -------------------------------------------------------------


def own_trainer(out, r=4, steps=10, tie=True, **settings):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=tie,
    )  # fmt: skip
    model = apply_relora(LlamaForCausalLM(config), ReLoRaConfig(r=r, lora_dropout=0.1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    schedule = ReLoRaSchedule(model, optimizer, cosine_with_warmup(1, 20), 4, 1)
    rows = np.random.default_rng(0).integers(0, 64, (64, 16))
    settings = {
        "output_dir": str(out), "max_steps": steps, "per_device_train_batch_size": 2,
        "save_steps": 3, "report_to": "none", "disable_tqdm": True, "use_cpu": True, **settings,
    }  # fmt: skip
    return ReLoRaTrainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=data.Blocks(rows, 0, 64, seed=0),
        optimizers=(optimizer, schedule.lr_scheduler),
        callbacks=[ReLoRaCallback(schedule), SkipNonFiniteCallback()],
    )


@pytest.mark.parametrize("tie", [True, False])
def test_own_trainer_resumes_bit_for_bit_from_the_last_valid_checkpoint(tmp_path, tie):
    """Stock shuffling, weights tied or not, dropout; the newest checkpoint is damaged."""
    whole = own_trainer(tmp_path / "a", tie=tie)
    whole.train()
    own_trainer(tmp_path / "b", steps=8, tie=tie).train()
    os.truncate(tmp_path / "b/checkpoint-8/model.safetensors", 100)
    again = own_trainer(tmp_path / "b", tie=tie)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 10
    for (name, a), b in zip(whole.model.state_dict().items(), again.model.state_dict().values()):
        assert torch.equal(a, b), name
    config = json.loads((tmp_path / "b/checkpoint-9/config.json").read_text())
    assert config["model_type"] == "llama"


def test_own_trainer_resumes_from_a_folder_of_any_name(tmp_path):
    own_trainer(tmp_path, steps=3).train()
    (tmp_path / "checkpoint-3").rename(tmp_path / "kept")
    again = own_trainer(tmp_path, steps=4)
    again.train(str(tmp_path / "kept"))
    assert again.state.global_step == 4


def test_own_trainer_refuses_what_it_cannot_resume(tmp_path, caplog):
    own_trainer(tmp_path, steps=3).train()
    with pytest.raises(checkpoint.OtherRun, match=r"relora.r: expected 4, got 2"):
        own_trainer(tmp_path, r=2).train(resume_from_checkpoint=True)
    with pytest.raises(checkpoint.OtherRun, match="parameter groups .*: got also lm_head.weight"):
        own_trainer(tmp_path, tie=False).train(str(tmp_path / "checkpoint-3"))
    (tmp_path / "checkpoint-3/manifest.json").unlink()
    for wanted in (True, str(tmp_path / "checkpoint-3")):
        with pytest.raises(ValueError, match="expected a valid checkpoint of ReLoRaTrainer"):
            own_trainer(tmp_path).train(resume_from_checkpoint=wanted)


def test_own_trainer_says_when_transformers_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "_HOOKS", ("_save_checkpoint", "_write_checkpoint"))
    with pytest.raises(
        RuntimeError, match="expected a Trainer with _write_checkpoint, got transform"
    ):
        own_trainer(tmp_path)


def test_own_trainer_refuses_to_save_between_merge_and_reset_case39(tmp_path, monkeypatch):
    trainer = own_trainer(tmp_path)
    trainer._relora_schedule.lr_scheduler.restarting = {"x": 0}
    with pytest.raises(RuntimeError, match="no checkpoint between a merge and its reset"):
        trainer.train()
    assert not list(Path(tmp_path).glob("checkpoint-*"))
