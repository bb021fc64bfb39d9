"""relora-train: arguments, data, and whole runs of a tiny model through main()."""

import dataclasses
import hashlib
import itertools
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed.run
import yaml

pytest.importorskip("transformers")

from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM, Trainer, TrainingArguments

from relora_kernels import ReLoRaConfig, ReLoRaSchedule, apply_relora, cosine_with_warmup
from relora_kernels.model import relora_layers
from relora_kernels.train import ReLoRaCallback, SkipNonFiniteCallback, cli, data
from relora_kernels.train.args import FIELDS, PRESETS, parse_args
from relora_kernels.train.metrics import MetricsCallback
from relora_kernels.train.output import RunFolder

# 6 steps of warm start, then 24 of ReLoRA in 4 cycles: restarts at steps 12, 18 and 24 of the run.
TINY = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_layers": 2,
    "num_heads": 2,
    "seq_length": 16,
    "batch_size": 4,
    "micro_batch_size": 2,
    "steps": 30,
    "warm_start_steps": 6,
    "warmup_steps": 2,
    "cycle_steps": 6,
    "restart_warmup_steps": 2,
    "learning_rate": 0.01,
    "lora_r": 4,
    "eval_every": 6,
    "eval_tokens": 256,
    "save_every": 4,
    "log_every": 1,
}
RESTARTS = [12, 18, 24]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads gain nothing at this size, and wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def words(n, seed=0):
    rng = np.random.default_rng(seed)
    return "\n".join(" ".join(rng.choice(list("abcdefgh"), 8)) + "." for _ in range(n))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(words(1500), encoding="utf-8")
    return path


def flags(text, out, **settings):
    settings = {**TINY, "train_files": text, "output_dir": out, **settings}
    return [token for key, value in settings.items() for token in (f"--{key}", str(value))]


class SpyCallback(ReLoRaCallback):
    """Records of each step whether it left W alone, whether a merge moved W, whether B is 0."""

    seen = []

    def _weights(self):
        return [layer.weight.detach().clone() for _, layer in relora_layers(self.schedule.model)]

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        SpyCallback.seen, self.before = [], self._weights()

    def on_step_end(self, args, state, control, **kwargs):
        stepped = self._weights()
        super().on_step_end(args, state, control, **kwargs)
        after = self._weights()
        B_zero = all(not layer.lora_B.any() for _, layer in relora_layers(self.schedule.model))
        same = [map(torch.equal, a, b) for a, b in ((self.before, stepped), (stepped, after))]
        SpyCallback.seen.append((all(same[0]), not any(same[1]), B_zero))
        self.before = after


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """A finished run with dropout: its folder, and the trained model's logits before the export."""
    out = tmp_path_factory.mktemp("run") / "out"
    ids = torch.arange(32).reshape(2, 16)
    logits = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "ReLoRaCallback", SpyCallback)
        finish = cli.Run.finish

        @torch.no_grad()
        def keep_logits(run, model):
            logits["trained"] = model.eval()(ids).logits
            finish(run, model)

        patch.setattr(cli.Run, "finish", keep_logits)
        assert cli.main(flags(text, out, lora_dropout=0.1)) == 0
    return RunFolder(out), ids, logits["trained"], SpyCallback.seen


def series(folder, key):
    return [(r["step"], r[key]) for r in folder.rows() if key in r]


# --- arguments ---------------------------------------------------------------------------------


def test_presets_are_the_papers_models():
    shapes = {
        name: [int(p[k]) for k in ("hidden_size", "intermediate_size", "num_layers", "num_heads")]
        for name, p in PRESETS.items()
    }
    assert shapes == {
        "micro": [128, 344, 4, 4],
        "60m": [512, 1376, 8, 8],
        "130m": [768, 2048, 12, 12],
        "250m": [768, 2560, 24, 16],
        "350m": [1024, 2736, 24, 16],
        "1.3b": [2048, 5461, 24, 32],
    }
    args = parse_args(["--preset", "130m"])
    assert (args.seq_length, args.batch_size, args.vocab_size) == (256, 600, 32100)
    assert (args.steps, args.cycle_steps, args.learning_rate, args.lora_r) == (
        20000,
        2000,
        1e-3,
        128,
    )


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid(preset, processes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    args = parse_args(["--preset", preset])
    assert args.relora_steps >= 3 * args.cycle_steps
    assert args.paired and (args.restart_warmup_steps >= 50 or preset == "micro")


def test_flags_win_over_yaml_wins_over_preset(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "preset: 60m\nlora_r: 16\nlearning_rate: 1e-4\ntarget_modules: [q_proj, v_proj]\n"
    )
    args = parse_args(["--config", str(config), "--lora_r", "8"])
    assert (args.preset, args.hidden_size) == ("60m", 512)
    assert (args.lora_r, args.learning_rate) == (8, 1e-4)
    assert args.warm_start_learning_rate == 1e-4  # follows learning_rate
    assert args.targets == ["q_proj", "v_proj"]


def test_saved_settings_read_back(tmp_path):
    args = parse_args(["--no_paired", "--train_files", "a b.txt", "c.txt", "--bf16", "true"])
    (tmp_path / "config.yaml").write_text(args.to_yaml())
    assert parse_args(["--config", str(tmp_path / "config.yaml")]) == args


@pytest.mark.parametrize(
    ("values", "targets"),
    [(["q_proj"], ["q_proj"]), (["all-linear"], "all-linear"), ([r".*\.mlp\..*"], r".*\.mlp\..*")],
)
def test_one_target_is_a_name_or_an_expression(values, targets):
    assert parse_args(["--target_modules", *values]).targets == targets


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--step", "3"], "did you mean steps"),
        (["--preset", "2b"], "invalid choice"),
        (["--lora_r", "x"], "invalid int value"),
        (["--lora_r", "0"], "expected lora_r > 0, got 0"),
        (["--lora_dropout", "1.5"], "expected lora_dropout in [0, 1], got 1.5"),
        (["--learning_rate", "nan"], "expected learning_rate > 0, got nan"),
        (["--warm_start_steps", "9000"], "expected warm_start_steps <= steps, got 9000"),
        (["--cycle_steps", "20"], "expected restart_warmup_steps < cycle_steps (20), got 30"),
        (["--warmup_steps", "600"], "expected warmup_steps <"),
        (["--num_heads", "5"], "expected hidden_size to be an even multiple of num_heads"),
        (["--seq_length", "1"], "expected seq_length >= 2, got 1"),
        (["--seed", str(2**33)], "expected seed < 2^32"),
        (["--lora_alpha", "inf"], "expected a finite lora_alpha, got inf"),
        (["--train_files", "a", "--dataset", "b"], "expected --train_files or --dataset, got both"),
        (["--resume", "--overwrite"], "expected one of --resume and --overwrite"),
        (["--config", "none.yaml"], "expected a settings file at none.yaml, got none"),
    ],
)
def test_bad_flags_are_refused_by_name(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "relora-run").mkdir()
    (tmp_path / "relora-run" / "config.yaml").write_text("")
    with pytest.raises(SystemExit) as error:
        parse_args(flags)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stesp: 3", "unknown option 'stesp' (did you mean steps?)"),
        ("- a\n- b", "expected `option: value` lines, got list"),
        ("a: [", "is not YAML"),
        ("steps: many", "invalid int value: 'many'"),
    ],
)
def test_bad_yaml_is_refused_by_name(content, message, capsys, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(content)
    with pytest.raises(SystemExit):
        parse_args(["--config", str(config)])
    assert message in capsys.readouterr().err


def test_torchrun_lets_every_flag_pass():
    """It refuses a script's flag that could be short for several of its own, `--r` for one."""
    parser = torch.distributed.run.get_args_parser()
    for name in FIELDS:
        assert not parser._get_option_tuples(f"--{name}"), name


def test_help_shows_the_presets_defaults(capsys):
    with pytest.raises(SystemExit) as error:
        parse_args(["--preset", "1.3b", "--help"])
    assert error.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Width of the MLP. (default: 5461)" in text
    assert "default: None" not in text and "--no_paired" not in text


# --- data --------------------------------------------------------------------------------------


def test_embedded_corpus_repeats_and_its_splits_are_disjoint():
    first, second = (data.load_corpus(parse_args([])) for _ in range(2))
    assert first.sha256 == second.sha256
    assert not set(first.train) & set(first.validation)
    held_out = sum(map(len, first.validation))
    assert 0.05 <= held_out / (held_out + sum(map(len, first.train))) < 0.08


def test_hash_depends_on_contents_and_boundaries():
    def sha(train, validation):
        return data.Corpus("", train, validation).sha256

    hashes = [sha(["ab"], []), sha(["a", "b"], []), sha([], ["ab"]), sha(["ba"], [])]
    assert len(set(hashes)) == 4


def test_split_keeps_every_line_of_a_single_document():
    document = words(400)
    train, validation = data.split([document])
    assert train and validation and not set(train) & set(validation)
    lines = sorted(document.splitlines())
    assert sorted(line for d in train + validation for line in d.splitlines()) == lines


def test_explicit_validation_is_kept_out_of_training(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text(words(50, ord(name)))
    args = parse_args(["--train_files", str(tmp_path), "--validation_files", str(tmp_path / "b")])
    corpus = data.load_corpus(args)
    assert corpus.validation == [(tmp_path / "b").read_text()]
    assert corpus.train == [(tmp_path / n).read_text() for n in "ac"]


def test_dataset_is_streamed_until_there_is_enough(tmp_path):
    pytest.importorskip("datasets")
    rows = [json.dumps({"body": f"{i} " + words(20, i)}) for i in range(200)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    tiny = ["--steps", "10", "--batch_size", "2", "--micro_batch_size", "2", "--seq_length", "8"]
    tiny += ["--warm_start_steps", "0", "--warmup_steps", "0", "--eval_tokens", "8"]
    named = ["--dataset", str(tmp_path), "--dataset_column"]
    corpus = data.load_corpus(parse_args([*tiny, *named, "body"]))
    taken = len(corpus.train) + len(corpus.validation)
    assert 2 <= taken < 200
    with pytest.raises(ValueError, match=r"one of \['body'\], got 'text'"):
        data.load_corpus(parse_args([*tiny, *named, "text"]))
    numbered = [
        json.dumps({"body": None if i % 3 == 0 else words(20, i), "n": i}) for i in range(200)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(numbered))
    assert all(data.load_corpus(parse_args([*tiny, *named, "body"])).train)
    with pytest.raises(ValueError, match="text in column 'n', got int"):
        data.load_corpus(parse_args([*tiny, *named, "n"]))


def test_tokenizer_round_trips_any_text(tmp_path):
    tokenizer = data.train_tokenizer([words(200)], 300)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for sample in ("a b c.\n", "  def f(x):\n\treturn x  \n", "naïve 数学 \U0001f600", ""):
        ids = tokenizer(sample)["input_ids"]
        assert tokenizer.decode(ids) == sample and loaded(sample)["input_ids"] == ids
    assert loaded.eos_token == data.EOS


def test_a_tokenizer_of_ones_own(tmp_path):
    data.train_tokenizer([words(200)], 270).save_pretrained(tmp_path)
    args = parse_args(["--tokenizer", str(tmp_path)])
    corpus = data.Corpus("", [words(5)], [])
    assert data.load_tokenizer(args, corpus).eos_token == data.EOS
    config = tmp_path / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({k: v for k, v in settings.items() if k != "eos_token"}))
    with pytest.raises(ValueError, match="expected an end-of-text token, got none"):
        data.load_tokenizer(args, corpus)


def test_pack_ends_every_document_and_loses_only_the_tail():
    tokenizer = data.train_tokenizer([words(200)], 300)
    documents = [words(5, i) for i in range(3)]
    stream = list(
        itertools.chain.from_iterable(
            [*tokenizer(d)["input_ids"], tokenizer.eos_token_id] for d in documents
        )
    )
    blocks = data.pack(documents, tokenizer, 16)
    assert blocks.flatten().tolist() == stream[: len(stream) // 16 * 16]


def test_blocks_are_a_function_of_seed_and_sample_alone():
    rows = np.arange(20).reshape(10, 2)

    def read(start, samples, seed=0):
        blocks = data.Blocks(rows, start, samples, seed)
        return [blocks[i]["input_ids"][0].item() for i in range(len(blocks))]

    whole = read(0, 30)
    assert read(0, 7) + read(7, 23) == whole
    epochs = [whole[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(e) == list(range(0, 20, 2)) for e in epochs)
    assert epochs[0] != epochs[1] and read(0, 10, seed=1) != epochs[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [  # case 46
        ("", "expected at least 64 training tokens (batch_size 4 x seq_length 16), got 0"),
        ("a b c d", "expected at least 64 training tokens"),
        ("\n".join(["a b c d e f g h i j"] * 3), "expected at least"),
        (b"\xff\xfe", "expected UTF-8 text"),
        (None, "expected text files at"),
    ],
)
def test_bad_corpus_is_refused(content, message, tmp_path, capsys):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert cli.main(flags(path, tmp_path / "out")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_target_is_refused_before_the_warm_start(text, tmp_path, capsys):  # case 44
    assert cli.main(flags(text, tmp_path / "out", target_modules="query")) == 2
    assert "q_proj" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- whole runs --------------------------------------------------------------------------------


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


def digest(folder):
    return hashlib.sha256((folder.final / "model.safetensors").read_bytes()).hexdigest()


def same_course(folder, other):
    """Bitwise: losses, rates, gradient norms and the final weights; not the clock."""
    for key in ("loss", "eval_loss", "lr", "grad_norm", "cycle", "restart", "tokens"):
        assert series(folder, key) == series(other, key), key
    assert digest(folder) == digest(other)


@pytest.mark.parametrize(
    "lost",
    [
        ["relora/checkpoint-24"],
        ["relora"],
        ["relora", "warm_start/checkpoint-6"],
    ],
    ids=["in ReLoRA", "between the phases", "in the warm start"],
)
def test_resume_equals_an_uninterrupted_run(finished, lost, tmp_path):
    folder = RunFolder(shutil.copytree(finished[0].root, tmp_path / "out"))
    for path in lost:
        shutil.rmtree(folder.checkpoint / path)
    shutil.rmtree(folder.final)
    with folder.metrics.open("a") as file:
        file.write('{"phase": "relora", "step"')  # a killed process's last line
    assert cli.main(["--resume", "--output_dir", str(folder.root)]) == 0
    same_course(folder, finished[0])


def test_bf16_run_resumes_with_its_residuals_and_repeats(text, tmp_path):
    out = tmp_path / "out"
    assert cli.main(flags(text, out, bf16=True)) == 0
    folder, again = RunFolder(out), RunFolder(shutil.copytree(out, tmp_path / "again"))
    shutil.rmtree(again.checkpoint / "relora/checkpoint-24")
    assert cli.main(["--resume", "--output_dir", str(again.root)]) == 0
    same_course(again, folder)
    assert [s for s, _ in series(folder, "restart")] == RESTARTS
    model = LlamaForCausalLM.from_pretrained(folder.final)
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())  # residual and B A are in it


def test_resume_refuses_other_settings_and_another_corpus(finished, text, tmp_path, capsys):
    out = shutil.copytree(finished[0].root, tmp_path / "out")
    with pytest.raises(SystemExit):
        cli.main(["--resume", "--output_dir", str(out), "--lora_r", "8"])
    assert "expected lora_r 4, got 8" in capsys.readouterr().err
    other = tmp_path / "other.txt"
    other.write_text(words(1500, seed=1))
    config = yaml.safe_load((out / "config.yaml").read_text())
    (out / "config.yaml").write_text(yaml.safe_dump(config | {"train_files": [str(other)]}))
    before = (out / "metrics.jsonl").read_bytes()
    assert cli.main(["--resume", "--output_dir", str(out)]) == 2
    assert "--resume: expected the corpus" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_bytes() == before


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
    left = {p.name for p in folder.root.iterdir()}
    assert left <= {"thesis.txt", "logits.pt"}


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


def test_a_half_written_checkpoint_is_passed_over_case34(finished, tmp_path):
    folder = RunFolder(shutil.copytree(finished[0].root, tmp_path / "out"))
    whole = folder.last_checkpoint("relora")
    partial = folder.phase("relora") / "checkpoint-9999"
    shutil.copytree(whole, partial)
    (partial / "trainer_state.json").write_text('{"global_')
    assert folder.last_checkpoint("relora") == whole


def test_one_long_line_and_repeated_lines_are_text_enough():
    for document in ("word " * 4000, "the quick brown fox\n" * 1000):
        train, validation = data.split([document])
        assert sum(map(len, train)) > 10 * sum(map(len, validation)) > 0


def test_resume_finds_its_folder_through_the_yaml_file(finished, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"output_dir: {finished[0].root}\nresume: true\nlearning_rate: 0.5\n")
    with pytest.raises(SystemExit):
        parse_args(["--config", str(config)])
    config.write_text(f"output_dir: {finished[0].root}\n")
    assert parse_args(["--config", str(config), "--resume"]).learning_rate == TINY["learning_rate"]


def test_resume_needs_a_checkpoint(text, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("")
    assert cli.main(["--resume", "--output_dir", str(tmp_path)]) == 2
    assert "--resume: expected a checkpoint in" in capsys.readouterr().err


# --- callbacks in anybody's Trainer --------------------------------------------------------------


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


def test_callback_restarts_in_another_trainer(relora, tmp_path):
    model, optimizer, schedule = relora
    pair = (optimizer, schedule.lr_scheduler)
    tiny_trainer(tmp_path, model, pair, [ReLoRaCallback(schedule)], steps=5).train()
    assert schedule.cycle == 2
    assert all(int(layer.merge_count) == 2 for _, layer in relora_layers(model))


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


def poison(monkeypatch, backward_passes):
    """NaN in one gradient of these backward passes (two a step), before anything clips them."""
    passes = iter(range(10**6))

    def spoil(gradient):
        return gradient * torch.nan if next(passes) in backward_passes else gradient

    def adamw(model, learning_rate, make=cli._adamw):
        next(p for p in model.parameters() if p.requires_grad).register_hook(spoil)
        return make(model, learning_rate)

    monkeypatch.setattr(cli, "_adamw", adamw)


def test_steps_with_nan_gradients_are_skipped_and_counted_fault_5(text, tmp_path, monkeypatch):
    """Clipping must let them pass to where they are skipped; parameters stay as they were."""
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


def test_too_many_nan_gradients_end_the_run_with_clean_weights(text, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, range(12, 10**6))  # from step 7 on
    assert cli.main(flags(text, tmp_path / "out")) == 1
    assert "11 steps in a row up to step" in capsys.readouterr().err
    checkpoint = RunFolder(tmp_path / "out").last_checkpoint("relora")
    weights = load_file(f"{checkpoint}/model.safetensors")
    assert all(t.isfinite().all() for t in weights.values() if t.is_floating_point())
