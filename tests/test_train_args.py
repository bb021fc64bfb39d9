"""relora-train's arguments: flags over a YAML file over a preset."""

import pytest
import torch.distributed.run

pytest.importorskip("transformers")

from relora_kernels.train.args import FIELDS, PRESETS, parse_args


def test_presets_are_the_papers_models():
    shapes = {
        name: [int(p[k]) for k in ("hidden_size", "intermediate_size", "num_layers", "num_heads")]
        for name, p in PRESETS.items()
    }
    assert shapes == {
        "micro": [128, 344, 6, 4],
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
        (["--cycle_steps", "5"], "expected restart_warmup_steps < cycle_steps (5), got 5"),
        (["--warmup_steps", "600"], "expected warmup_steps <"),
        (["--num_heads", "5"], "expected hidden_size to be an even multiple of num_heads"),
        (["--seq_length", "1"], "expected seq_length >= 2, got 1"),
        (["--seed", str(2**33)], "expected seed < 2^32"),
        (["--warm_start_learning_rate", "inf"], "expected a finite warm_start_learning_rate >= 0"),
        (
            ["--lora_dtype", "bfloat16", "--bf16", "false"],
            "expected --bf16 with --lora_dtype bfloat16",
        ),
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
    """torchrun refuses a script's flag that could be short for several of its own, for example `--r`."""
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
