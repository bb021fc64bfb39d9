"""A tiny run of relora-train, and what the tests of it compare."""

import gc
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from relora_kernels.model import relora_layers
from relora_kernels.train import ReLoRaCallback, cli
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
# No two intervals coincide: a checkpoint lies inside a window of losses, a restart between checkpoints.
ODD_INTERVALS = {
    "log_every": 3,
    "save_every": 5,
    "eval_every": 7,
    "eval_tokens": 64,
    "lora_dropout": 0.1,
    "num_layers": 1,
}


def words(n, seed=0):
    rng = np.random.default_rng(seed)
    return "\n".join(" ".join(rng.choice(list("abcdefgh"), 8)) + "." for _ in range(n))


def flags(text, out, **settings):
    settings = {**TINY, "train_files": text, "output_dir": out, **settings}
    return [token for key, value in settings.items() for token in (f"--{key}", str(value))]


def series(folder, key):
    return [(r["step"], r[key]) for r in folder.rows() if key in r]


def digest(out):
    """SHA-256 of the exported weights."""
    return hashlib.sha256((Path(out) / "final" / "model.safetensors").read_bytes()).hexdigest()


def rows_to_compare(out):
    """The rows of metrics.jsonl, without values that depend on the clock or the machine."""
    told = ("seconds", "tokens_per_second", "peak_memory")
    return [{k: v for k, v in row.items() if k not in told} for row in RunFolder(out).rows()]


def same_course(out, other):
    """Asserts bitwise equal losses, rates, gradient norms and final weights; times may differ."""
    assert rows_to_compare(out) == rows_to_compare(other)
    assert digest(out) == digest(other)


class SpyCallback(ReLoRaCallback):
    """Records for each step whether it left W unchanged, whether a merge changed W, whether B is 0."""

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


def poison(monkeypatch, backward_passes):
    """NaN in one gradient of these backward passes (two a step), before anything clips them."""
    passes = iter(range(10**6))

    def spoil(gradient):
        return gradient * torch.nan if next(passes) in backward_passes else gradient

    def adamw(model, learning_rate, make=cli._adamw):
        next(p for p in model.parameters() if p.requires_grad).register_hook(spoil)
        return make(model, learning_rate)

    monkeypatch.setattr(cli, "_adamw", adamw)


def one_thread():
    """More threads gain nothing at this size, and wait for each other on a busy machine. Accelerate collects
    garbage four times a run, which would take a second if the imports were included."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def quick():
    """One thread, and neither plots nor a sample, which take as long as the training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.report, "plot_metrics", lambda *_: [])
        patch.setattr(cli.report, "sample_text", lambda *_: "")
        yield from one_thread()


def finished_run(text, out, **settings):
    """(folder, some ids, the trained model's logits before the export, SpyCallback.seen)."""
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
        assert cli.main(flags(text, out, lora_dropout=0.1, **settings)) == 0
    return RunFolder(out), ids, logits["trained"], SpyCallback.seen
