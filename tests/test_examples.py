"""The scripts in examples/, run as a user runs them, and resumed in the middle."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script, *flags, cwd):
    """Runs the script in a process of its own, and returns what it printed."""
    path = os.pathsep.join(filter(None, [str(EXAMPLES.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, flags)],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def call(monkeypatch):
    """Runs a script in this process, which saves the seconds that importing torch takes."""

    def call(script, *flags, cwd):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield call
    torch.set_num_threads(threads)


def assert_equal(a, b, path=""):
    """Compares nested states bit for bit."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b)):
            assert_equal(*pair, f"{path}/{i}")
    else:
        assert a == b, path


def test_plain_loop_restarts_learns_and_resumes_bit_for_bit(tmp_path, call):
    flags = ["--steps", 75, "--restart-every", 25]
    printed = run("plain_loop.py", *flags, "--checkpoint", "straight.pt", cwd=tmp_path)
    lines = re.findall(r"step +(\d+)  loss (\S+)  lr (\S+)(?:  restart (\d))?", printed)
    assert [(int(step), restart) for step, _, _, restart in lines] == [
        (25, "1"),
        (50, "2"),
        (75, ""),
    ]
    assert float(lines[0][2]) == 0.0 == float(lines[1][2])  # the rate restarts with the merge
    assert float(lines[2][1]) < 0.9 * float(lines[0][1])
    cut = ["--checkpoint", "cut.pt"]
    call("plain_loop.py", *flags, *cut, "--stop-at", 37, cwd=tmp_path)
    call("plain_loop.py", *flags, *cut, "--resume", cwd=tmp_path)
    states = [torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("straight", "cut")]
    assert states[0]["schedule"]["restarts_done"] == 2
    assert_equal(*states)


def test_hf_trainer_learns_and_resumes_bit_for_bit(tmp_path, call):
    text = "".join(f"{i} and {i % 7} make {i + i % 7}.\n" for i in range(900))
    (tmp_path / "text.txt").write_text(text)
    settings = {
        "train_file": "text.txt", "block_size": 16, "vocab_size": 280, "hidden_size": 32,
        "num_layers": 2, "lora_r": 4, "lora_dropout": 0.1, "restart_every": 24, "max_steps": 72,
        "warmup_steps": 2, "learning_rate": 5e-3, "logging_steps": 24, "save_steps": 36,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    flags = [token for key, value in settings.items() for token in (f"--{key}", value)]
    printed = run("hf_trainer.py", *flags, "--output_dir", "straight", cwd=tmp_path)
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", printed)]
    assert len(losses) == 3 and losses[2] < 0.75 * losses[0]
    assert "restarts 2, held-out loss" in printed

    resume = ["--resume_from_checkpoint", "straight/checkpoint-36", "--output_dir", "resumed"]
    call("hf_trainer.py", *flags, *resume, cwd=tmp_path)
    for file in ("checkpoint-72/model.safetensors", "final/model.safetensors"):
        assert_equal(*(load_file(tmp_path / run / file) for run in ("straight", "resumed")))
    optimizers = [
        torch.load(tmp_path / run / "checkpoint-72" / "optimizer.pt", weights_only=True)
        for run in ("straight", "resumed")
    ]
    assert_equal(*optimizers)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "straight" / "final")
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
