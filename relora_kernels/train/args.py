"""The settings of a run: presets, flags and the YAML file."""

import argparse
import dataclasses
import difflib
import math
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import yaml
from transformers import HfArgumentParser

CONFIG_FILE = "config.yaml"  # in output_dir: the settings of the run

# One column per preset. Shapes, batch, steps, merge interval, learning rate and rank of 60m to 1.3b
# are the ReLoRA paper's. micro is sized for a few minutes on two CPU cores. It uses one thread: a
# second one raises throughput only from 5.9k to 7.6k tokens/s (two CPU cores, 2026-11-21, 60
# full-rank steps), so two runs side by side get more done.
_PRESET_TABLE = """
                         micro    60m      130m     250m     350m     1.3b
vocab_size               1024     32100    32100    32100    32100    32100
hidden_size              128      512      768      768      1024     2048
intermediate_size        344      1376     2048     2560     2736     5461
num_layers               6        8        12       24       24       24
num_heads                4        8        12       16       16       32
seq_length               128      256      256      512      512      512
batch_size               8        480      600      1152     1152     1536
micro_batch_size         8        48       40       32       32       16
steps                    800      10000    20000    20000    20000    30000
warm_start_steps         200      2500     5000     5000     5000     10000
warmup_steps             50       500      500      500      500      500
cycle_steps              100      1000     2000     5000     5000     5000
restart_warmup_steps     5        100      100      100      100      100
learning_rate            2e-3     1e-3     1e-3     1e-3     5e-4     4e-4
lora_r                   8        128      128      128      128      128
lora_alpha               32       32       32       32       32       32
eval_every               100      500      500      500      500      500
eval_tokens              32768    2000000  2000000  2000000  2000000  2000000
save_every               200      500      500      500      500      500
log_every                10       10       10       10       10       10
cpu_threads              1        0        0        0        0        0
"""


def _read_table(table: str) -> dict[str, dict[str, str]]:
    header, *rows = [line.split() for line in table.strip().splitlines()]
    return {p: {row[0]: row[1 + i] for row in rows} for i, p in enumerate(header)}


PRESETS = _read_table(_PRESET_TABLE)


def _preset(name: str, help: str):
    """A field whose default is the preset's value (micro's if no preset is named)."""
    value = PRESETS["micro"][name]
    number = int(value) if value.isdigit() else float(value)
    return field(default=number, metadata={"help": help})


def _option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class RunArgs:
    _argument_group_name = "run"

    preset: Literal["micro", "60m", "130m", "250m", "350m", "1.3b"] = _option(
        "micro", "One of the paper's models, or a micro one: sets the defaults of all below."
    )
    output_dir: str = _option("relora-run", "Where everything that the run writes goes.")
    resume: bool = _option(
        False,
        "Continue the run in output_dir from its last valid checkpoint, with its own settings; from "
        "the start if it has not come to one.",
    )
    overwrite: bool = _option(False, "Delete the earlier run in output_dir and start anew.")
    seed: int = _option(0, "Seeds initialisation, data order, dropout and each restart.")
    bf16: bool | None = _option(
        None,
        "bf16 compute (autocast) and bf16 frozen weights, with fp32 trainable parameters. Unset: "
        "on where the GPU supports it, off on a CPU.",
    )
    diagnostics: bool = _option(
        False, "Also measure the first updates after each restart, and what merges keep of theirs."
    )
    cpu_threads: int = _preset("cpu_threads", "Threads on a CPU; 0 leaves the choice to torch.")
    log_every: int = _preset("log_every", "Steps between two rows of training loss.")
    eval_every: int = _preset("eval_every", "Steps between two validations.")
    save_every: int = _preset("save_every", "Steps between two checkpoints (two are kept).")


@dataclass
class DataArgs:
    _argument_group_name = "data (default: the sources of this Python's standard library)"

    train_files: list[str] | None = _option(
        None,
        "Your own UTF-8 text: files, folders (all files below but output_dir's) or quoted glob patterns.",
    )
    validation_files: list[str] | None = _option(
        None,
        "Held-out text. Unset: five per cent of the text, in documents (or pieces, if there are few) chosen by "
        "their hash.",
    )
    dataset: str | None = _option(
        None, "A text data set for `datasets`, streamed: name or name:config, e.g. allenai/c4:en."
    )
    dataset_column: str = _option("text", "The column of --dataset that holds the text.")
    tokenizer: str | None = _option(
        None, "A tokenizer's name or folder. Unset: a BPE is trained on the training split."
    )
    vocab_size: int = _preset("vocab_size", "Tokens of the BPE that is trained.")
    seq_length: int = _preset("seq_length", "Tokens of one training sequence.")
    eval_tokens: int = _preset("eval_tokens", "Validate on at most this many tokens.")


@dataclass
class ModelArgs:
    _argument_group_name = "model (a Llama)"

    hidden_size: int = _preset("hidden_size", "Width.")
    intermediate_size: int = _preset("intermediate_size", "Width of the MLP.")
    num_layers: int = _preset("num_layers", "Number of blocks.")
    num_heads: int = _preset("num_heads", "Attention heads in a block.")


@dataclass
class TrainArgs:
    _argument_group_name = "training"

    steps: int = _preset("steps", "Optimizer steps in all: full-rank warm start, then ReLoRA.")
    warm_start_steps: int = _preset(
        "warm_start_steps", "Full-rank steps before ReLoRA; equal to steps: full-rank throughout."
    )
    warmup_steps: int = _preset(
        "warmup_steps", "Learning rate warm-up at the start of either phase."
    )
    learning_rate: float = _preset("learning_rate", "Peak learning rate of the ReLoRA phase.")
    warm_start_learning_rate: float | None = _option(
        None, "Peak learning rate of the warm start. Unset: learning_rate."
    )
    warm_start_from: str | None = _option(
        None, "Take the warm start of the run in this folder, made with the same settings, instead."
    )
    min_lr_ratio: float = _option(0.1, "Where the cosine ends, as a share of the peak.")
    batch_size: int = _preset("batch_size", "Sequences of one optimizer step, all devices.")
    micro_batch_size: int = _preset(
        "micro_batch_size",
        "Sequences in memory at once on one device, at most; the rest is accumulated.",
    )
    sharding: Literal["none", "full"] = _option(
        "none",
        "With several processes: none keeps the model on every device (DDP), full spreads weights, "
        "gradients and moments over them (FSDP2).",
    )
    max_grad_norm: float = _option(1.0, "Gradient clipping; 0 turns it off.")


@dataclass
class ReLoRaArgs:
    _argument_group_name = "ReLoRA"

    lora_r: int = _preset("lora_r", "Rank of one cycle.")
    lora_alpha: float = _preset("lora_alpha", "The update is scaled by lora_alpha / lora_r.")
    lora_dropout: float = _option(0.0, "Dropout before A.")
    lora_dtype: Literal["float32", "bfloat16"] | None = _option(
        None, "Of A, B and their moments. Unset: float32, also beside bf16 weights."
    )
    target_modules: list[str] | None = _option(
        None,
        "Names of the linear layers to wrap, or one regular expression, or all-linear. Unset: the "
        "attention and MLP projections.",
    )
    cycle_steps: int = _preset(
        "cycle_steps",
        "Steps between two restarts (merge, new A and B): ReLoRaSchedule's restart_every.",
    )
    restart_warmup_steps: int = _preset(
        "restart_warmup_steps", "Learning rate warm-up after a restart."
    )
    reset_mode: Literal["magnitude", "random", "zero", "none"] = _option(
        "magnitude", "How a restart prunes Adam's moments of A and B."
    )
    reset_ratio: float = _option(0.9, "Share of the moments that magnitude and random prune.")
    paired: bool = _option(
        True, "One mask for both moments; off: the original's independent masks, which blow up."
    )
    merge_rounding: Literal["nearest", "stochastic", "compensated"] | None = _option(
        None, "How a merge rounds to bf16. Unset: compensated for bf16 weights, exact for fp32."
    )


GROUPS = (RunArgs, DataArgs, ModelArgs, TrainArgs, ReLoRaArgs)


@dataclass
class Args(ReLoRaArgs, TrainArgs, ModelArgs, DataArgs, RunArgs):
    """All options of a run."""

    def __post_init__(self):
        if self.warm_start_learning_rate is None:
            self.warm_start_learning_rate = self.learning_rate
        if self.bf16 is None:
            self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)

    @property
    def device_batch_size(self) -> int:
        """The largest microbatch up to micro_batch_size that divides a device's share of batch_size."""
        share = self.batch_size // world_size()
        return next(n for n in range(min(self.micro_batch_size, share), 0, -1) if share % n == 0)

    @property
    def relora_steps(self) -> int:
        return self.steps - self.warm_start_steps

    @property
    def targets(self) -> list[str] | str | None:
        """target_modules as ReLoRaConfig takes them.

        A single value that is not an identifier is passed as a string: a regular expression or
        all-linear.
        """
        if self.target_modules and len(self.target_modules) == 1:
            [target] = self.target_modules
            return [target] if target.isidentifier() else target
        return self.target_modules

    def settings(self) -> dict:
        """What `--config` reads."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in _NOT_SAVED}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.settings(), sort_keys=False)


FIELDS = {f.name: f for f in dataclasses.fields(Args)}
_NOT_SAVED = ("output_dir", "resume", "overwrite")
# A resumed run may change its use of memory and devices, but not what it computes or logs.
_FREE_ON_RESUME = (*_NOT_SAVED, "micro_batch_size", "sharding")
# The settings that a warm start depends on.
WARM_START = (
    "seed bf16 train_files validation_files dataset dataset_column tokenizer vocab_size seq_length "
    "hidden_size intermediate_size num_layers num_heads steps warm_start_steps warmup_steps "
    "warm_start_learning_rate min_lr_ratio batch_size max_grad_norm"
).split()
_POSITIVE = (
    "steps cycle_steps batch_size micro_batch_size learning_rate lora_r lora_alpha vocab_size "
    "seq_length hidden_size intermediate_size num_layers num_heads eval_tokens log_every "
    "eval_every save_every"
).split()
_NOT_NEGATIVE = (
    "warm_start_steps warmup_steps restart_warmup_steps warm_start_learning_rate max_grad_norm "
    "seed cpu_threads"
).split()
_SHARES = "lora_dropout reset_ratio min_lr_ratio".split()

_EPILOG = """\
examples:
  relora-train                                        a small model, a few minutes on a CPU
  relora-train --train_files 'notes/*.txt' --steps 2000
  relora-train --preset 130m --dataset allenai/c4:en --tokenizer t5-base --output_dir c4-130m
  relora-train --config run.yaml --lora_r 64          a flag wins over the file
  relora-train --resume --output_dir c4-130m          go on from the last valid checkpoint
  torchrun --nproc-per-node 8 -m relora_kernels.train --preset 1.3b --sharding full ...
  relora-train --preset 130m --help                   the defaults of that preset

A run that is killed loses the steps since its last checkpoint. SIGTERM or Ctrl-C ends it after the
step under way and a checkpoint; a second one, two seconds later or more, at once (torchrun gives
its processes 30 seconds). --resume goes on, bit for bit as if nothing had been; at another number of
processes up to rounding, with other dropout.

exit codes: 0 done, 1 training failed (the last lines say why), 2 bad options or data,
143 and 130 saved and stopped by SIGTERM and Ctrl-C (torchrun itself then ends with 1)
"""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """One line per option: no alternative spelling, no default if the text already gives it."""

    def __init__(self, prog: str):
        width = min(100, shutil.get_terminal_size().columns - 2)
        super().__init__(prog, max_help_position=32, width=width)

    def _format_action_invocation(self, action):
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        metavar = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{action.option_strings[0]} {metavar}"

    def _get_default_metavar_for_optional(self, action):
        return {int: "N", float: "X", str: "VALUE"}.get(action.type, "BOOL")

    def _get_help_string(self, action):
        told = action.default is None or action.default is False
        return action.help if told else super()._get_help_string(action)

    def add_argument(self, action):
        if not isinstance(action, argparse._StoreFalseAction):  # --no_x, the opposite of --x
            super().add_argument(action)

    def add_usage(self, usage, actions, groups, prefix=None):
        super().add_usage("relora-train [options]", [], [], prefix)


def _parser() -> HfArgumentParser:
    parser = HfArgumentParser(
        GROUPS,
        prog="relora-train",
        description="Pretrains a Llama with ReLoRA: a full-rank warm start, then cycles of "
        "low-rank updates that are merged into the weights.",
        epilog=_EPILOG,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="RUN.YAML", help="A file of `option: value` lines; flags win over it."
    )
    return parser


def parse_args(argv: list[str] | None = None) -> Args:
    """Flags win over `--config`, which wins over the preset. A bad option exits with a message."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    asked = [a for a in argv if a not in ("-h", "--help")]  # help must wait for the preset
    known, _ = parser.parse_known_args(asked)
    try:
        from_file = _settings(Path(known.config)) if known.config else {}
        known, _ = parser.parse_known_args([*_as_flags(from_file), *asked])
        saved = _settings(Path(known.output_dir) / CONFIG_FILE) if known.resume else {}
    except ValueError as error:
        parser.error(str(error))

    tokens = _as_flags(saved | from_file)
    preset = parser.parse_known_args([*tokens, *asked])[0].preset
    parser.set_defaults(preset=preset, **PRESETS[preset])
    namespace, unknown = parser.parse_known_args([*tokens, *argv])
    if unknown:
        parser.error(f"unknown option{_suggestion(unknown[0].lstrip('-'))}: {' '.join(unknown)}")
    args = _args(namespace)
    problems = _problems(args)
    if known.resume:
        before = _args(parser.parse_args(_as_flags(saved)))
        problems += [
            f"--resume continues the run as it was: expected {name} {getattr(before, name)}, got "
            f"{getattr(args, name)}"
            for name in FIELDS
            if name not in _FREE_ON_RESUME and getattr(before, name) != getattr(args, name)
        ]
    if problems:
        parser.error("; ".join(problems))
    return args


def _args(namespace: argparse.Namespace) -> Args:
    return Args(**{name: getattr(namespace, name) for name in FIELDS})


def _settings(path: Path) -> dict:
    """The YAML file's options; ValueError names what cannot be read."""
    if not path.is_file():
        raise ValueError(f"expected a settings file at {path}, got none")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected `option: value` lines, got {type(settings).__name__}")
    for key in settings:
        if key not in FIELDS:
            raise ValueError(f"{path}: unknown option {key!r}{_suggestion(str(key))}")
    return settings


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name, FIELDS, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _as_flags(settings: dict) -> list[str]:
    """Settings as flags, so that one parser checks both."""
    flags = []
    for key, value in settings.items():
        if value is not None:
            flags += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def _problems(args: Args) -> list[str]:
    found = []

    def expect(ok: bool, what: str, got) -> None:
        if not ok:
            found.append(f"expected {what}, got {got}")

    for name in _POSITIVE:
        value = getattr(args, name)
        expect(value > 0, f"{name} > 0", value)
        expect(value < math.inf, f"a finite {name}", value)
    for name in _NOT_NEGATIVE:
        value = getattr(args, name)
        expect(0 <= value < math.inf, f"a finite {name} >= 0", value)
    for name in _SHARES:
        expect(0 <= getattr(args, name) <= 1, f"{name} in [0, 1]", getattr(args, name))
    if found:
        return found
    expect(args.warm_start_steps <= args.steps, "warm_start_steps <= steps", args.warm_start_steps)
    for phase in (args.warm_start_steps and args.steps, args.relora_steps):
        expect(
            args.warmup_steps < phase or phase <= 0,
            f"warmup_steps < {phase}, the length of its schedule",
            args.warmup_steps,
        )
    expect(
        args.restart_warmup_steps < args.cycle_steps,
        f"restart_warmup_steps < cycle_steps ({args.cycle_steps})",
        args.restart_warmup_steps,
    )
    expect(
        args.hidden_size % (2 * args.num_heads) == 0,
        "hidden_size to be an even multiple of num_heads (rotary positions)",
        f"{args.hidden_size} and {args.num_heads}",
    )
    expect(
        args.batch_size % world_size() == 0,
        f"batch_size to be a multiple of the number of processes ({world_size()})",
        args.batch_size,
    )
    expect(args.bf16 or args.lora_dtype != "bfloat16", "--bf16 with --lora_dtype bfloat16", "none")
    expect(args.seq_length >= 2, "seq_length >= 2", args.seq_length)
    expect(args.seed < 2**32, "seed < 2^32", args.seed)
    expect(not (args.resume and args.overwrite), "one of --resume and --overwrite", "both")
    expect(not (args.train_files and args.dataset), "--train_files or --dataset", "both")
    return found


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    return world_size() == 1 or int(os.environ.get("RANK", "0")) == 0
