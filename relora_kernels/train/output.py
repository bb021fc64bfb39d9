"""The folder of a run: its contents, who may write to it, what a resumed run finds there."""

import contextlib
import fcntl
import json
from pathlib import Path

import yaml

from relora_kernels import files

from . import checkpoint
from .args import CONFIG_FILE, FIELDS

# What save_pretrained of a model and of a tokenizer may write.
_FINAL = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json",
          "tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "added_tokens.json",
          "chat_template*", "spiece.model")  # fmt: skip


class RunFolder:
    """Paths below output_dir.

    config.yaml     the settings of the run, for --config
    corpus.json     what it was trained on
    metrics.jsonl   one row per logged step, validation and restart
    tensorboard/    the same for TensorBoard
    plots/          summary.png, and its parts loss.png, learning_rate.png, spectrum.png
    spectrum/       weights at the start of ReLoRA, factors of the first cycle, singular values
    summary.json    the table printed at the end, and more
    final/          the merged model and its tokenizer, an ordinary Hugging Face checkpoint
    checkpoint/     warm_start/ and relora/: checkpoints of the two phases, for --resume
    run.lock        empty; locked while a process trains here
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.config = self.root / CONFIG_FILE
        self.corpus = self.root / "corpus.json"
        self.metrics = self.root / "metrics.jsonl"
        self.tensorboard = self.root / "tensorboard"
        self.plots = self.root / "plots"
        self.spectrum = self.root / "spectrum"
        self.summary = self.root / "summary.json"
        self.final = self.root / "final"
        self.checkpoint = self.root / "checkpoint"
        self.lock_file = self.root / "run.lock"
        self._lock = contextlib.ExitStack()

    def lock(self) -> None:
        """Lock until `close` or the end of this process. ValueError if another process trains here."""
        self.root.mkdir(parents=True, exist_ok=True)
        file = self._lock.enter_context(self.lock_file.open("a"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"expected no other process to train in {self.root}, got one that holds "
                f"{self.lock_file.name}: wait for it or end it"
            ) from None
        except OSError as error:  # a file system without locks
            print(f"{self.root} cannot be locked ({error}): start no second run there")

    def close(self) -> None:
        self._lock.close()

    def check(self, resume: bool, overwrite: bool) -> None:
        """ValueError if the run would overwrite something, or has nothing to resume from."""
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"expected --output_dir to be a folder, got the file {self.root}")
        if resume:
            if not self.corpus.is_file():
                raise ValueError(
                    f"--resume: expected a run in {self.root}, got no {self.corpus.name}"
                )
        elif self.root.exists() and not self._holds_nothing():
            if not overwrite:
                raise ValueError(
                    f"expected --output_dir to be new or empty, got {self.root} with files in it: "
                    "give another one, --resume to continue that run, or --overwrite to delete it"
                )
            if not self._is_a_run():
                raise ValueError(
                    f"--overwrite: expected an earlier run in {self.root}, got a folder without its "
                    f"corpus.json, or with another {CONFIG_FILE}: nothing was deleted"
                )
            if foreign := set(self.final.glob("**/*")) - set(self._own_files()):
                raise ValueError(
                    f"--overwrite: expected only an exported model in {self.final}, got "
                    f"{min(foreign)}: move it away; nothing was deleted"
                )

    def _holds_nothing(self) -> bool:
        """Except for what a run killed at its start may have left."""
        left = {self.lock_file, files.temporary(self.corpus)}
        return left.issuperset(self.root.iterdir())

    def _is_a_run(self) -> bool:
        """Judged by corpus.json, written first and never deleted, and config.yaml if it exists."""
        try:
            settings = {}
            if self.config.exists():
                settings = yaml.safe_load(self.config.read_text(encoding="utf-8"))
            return settings.keys() <= FIELDS.keys() and "sha256" in self.corpus_record()
        except (OSError, ValueError, AttributeError, yaml.YAMLError):
            return False

    def corpus_record(self) -> dict:
        """The contents of corpus.json. ValueError if they are not a run's record."""
        record = json.loads(self.corpus.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or not {"sha256", "source"} <= record.keys():
            raise ValueError(f"expected a run's record in {self.corpus}, got {record!r:.80}")
        return record

    def _own_files(self) -> list[Path]:
        """The files below root that a run writes."""
        patterns = [p.name for p in (self.config, self.corpus, self.metrics, self.summary)]
        patterns += [f"{name}.tmp" for name in patterns]
        patterns += [
            "tensorboard/events.out.tfevents.*",
            *(f"plots/{name}.png" for name in ("loss", "learning_rate", "spectrum", "summary")),
            "spectrum/start.safetensors*",
            "spectrum/first_cycle.safetensors*",
            "spectrum/singular_values.json*",
        ]
        patterns += [f"checkpoint/{phase}/**/*" for phase in ("warm_start", "relora")]
        for folder in ("final", "final.tmp"):
            patterns += [f"{folder}/{name}" for name in _FINAL]
        return [path for pattern in patterns for path in self.root.glob(pattern)]

    def create(self) -> None:
        """Make the folder, and delete an earlier run's files from it, but no other files.

        corpus.json stays until the new run's replaces it: after a kill in between, it still identifies
        this folder as a run.
        """
        for path in self._own_files():
            if not path.is_dir() and path != self.corpus:
                path.unlink()
        for path in sorted(self.root.rglob("*"), reverse=True):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()  # children first
        self.root.mkdir(parents=True, exist_ok=True)

    def phase(self, name: str) -> Path:
        return self.checkpoint / name

    def last_checkpoint(self, phase: str) -> str | None:
        """The latest valid checkpoint, or None. Logs why it skips each later one."""
        path = checkpoint.last_valid(self.phase(phase))
        return None if path is None else str(path)

    def rows(self) -> list[dict]:
        """The rows of metrics.jsonl, without a last line that a killed process left half-written."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text(encoding="utf-8").split("\n")
        try:
            return [json.loads(line) for line in lines[:-1]]
        except ValueError as error:
            raise checkpoint.OtherRun(
                f"expected a row of JSON in each line of {self.metrics}, got another: {error}"
            ) from error

    def forget_rows_after(self, phase: str, step: int) -> list[dict]:
        """Drop the rows that a resumed run will write again; returns the rows that are left."""
        rows = [r for r in self.rows() if r["step"] <= step and (r["phase"], phase) != _LATER]
        write_json_lines(self.metrics, rows)
        return rows


_LATER = ("relora", "warm_start")  # a row of ReLoRA, when the warm start is being resumed


def write_json_lines(path: Path, rows: list[dict]) -> None:
    files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
