"""The folder of a run: what lies in it, who may write to it, what a resumed run finds there."""

import json
import os
import shutil
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from .args import CONFIG_FILE


class RunFolder:
    """Paths below output_dir.

    config.yaml     the settings of the run, for --config
    corpus.json     what it was trained on
    metrics.jsonl   one row per logged step, validation and restart
    tensorboard/    the same for TensorBoard
    plots/          loss.png, learning_rate.png
    summary.json    the table printed at the end, and more
    final/          the merged model and its tokenizer, an ordinary Hugging Face checkpoint
    checkpoint/     warm_start/ and relora/: Trainer's checkpoints, for --resume
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.config = self.root / CONFIG_FILE
        self.corpus = self.root / "corpus.json"
        self.metrics = self.root / "metrics.jsonl"
        self.tensorboard = self.root / "tensorboard"
        self.plots = self.root / "plots"
        self.summary = self.root / "summary.json"
        self.final = self.root / "final"
        self.checkpoint = self.root / "checkpoint"

    def check(self, resume: bool, overwrite: bool) -> None:
        """ValueError where the run would write over something, or has nothing to resume from."""
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"expected --output_dir to be a folder, got the file {self.root}")
        if resume:
            if not (self.last_checkpoint("relora") or self.last_checkpoint("warm_start")):
                raise ValueError(f"--resume: expected a checkpoint in {self.checkpoint}, got none")
        elif self.root.exists() and any(self.root.iterdir()):
            if not overwrite:
                raise ValueError(
                    f"expected --output_dir to be new or empty, got {self.root} with files in it: "
                    "give another one, --resume to continue that run, or --overwrite to delete it"
                )
            if not self.config.is_file():
                raise ValueError(
                    f"--overwrite: expected an earlier run in {self.root}, got a folder without "
                    f"{CONFIG_FILE}: nothing was deleted"
                )

    def create(self) -> None:
        """Makes the folder, and deletes an earlier run's files from it, but nobody else's."""
        for path in (self.tensorboard, self.plots, self.final, self.checkpoint):
            if path.is_dir():
                shutil.rmtree(path)
        for path in (self.corpus, self.metrics, self.summary, self.config):
            path.unlink(missing_ok=True)
        self.root.mkdir(parents=True, exist_ok=True)

    def phase(self, name: str) -> Path:
        return self.checkpoint / name

    def last_checkpoint(self, phase: str) -> str | None:
        folder = self.phase(phase)
        return get_last_checkpoint(folder) if folder.is_dir() else None

    def rows(self) -> list[dict]:
        """metrics.jsonl, without a last line that a killed process left half-written."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def forget_rows_after(self, phase: str, step: int) -> list[dict]:
        """Drops what a resumed run will measure again; returns the rows that are left."""
        rows = [r for r in self.rows() if r["step"] <= step and (r["phase"], phase) != _LATER]
        write_json_lines(self.metrics, rows)
        return rows


_LATER = ("relora", "warm_start")  # a row of ReLoRA, when the warm start is being resumed


def write_json_lines(path: Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """All or nothing: a reader never sees a half-written file."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
