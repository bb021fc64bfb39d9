"""The singular values of a run's update, and the plots of them."""

import itertools
import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from matplotlib import image
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from relora_kernels import (
    ReLoRaConfig,
    ReLoRaSchedule,
    apply_relora,
    cosine_with_warmup,
    merge_and_unload,
)
from relora_kernels.model import relora_layers
from relora_kernels.train import ReLoRaCallback, report, spectrum
from relora_kernels.train.args import PRESETS

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(blocks=2):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=blocks,
            num_attention_heads=2,
        )  # fmt: skip
    )


class Witness(ReLoRaCallback):
    """Keeps s B A of each cycle, in fp64."""

    def __init__(self, schedule):
        super().__init__(schedule)
        self.cycles = []

    def on_step_end(self, args, state, control, **kwargs):
        updates = {
            path: layer.scaling * (layer.lora_B.detach().double() @ layer.lora_A.detach().double())
            for path, layer in relora_layers(self.schedule.model)
        }
        before = self.schedule.cycle
        super().on_step_end(args, state, control, **kwargs)
        if self.schedule.cycle > before:
            self.cycles.append(updates)


def train(folder, model=None, steps=9, every=3, save=None, resume=None, **config):
    model = llama() if model is None else model
    apply_relora(model, ReLoRaConfig(r=4, **config))
    start = {path: spectrum._weight(layer) for path, layer in relora_layers(model)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = ReLoRaSchedule(model, optimizer, cosine_with_warmup(1, 20), every, 1)
    witness = Witness(schedule)
    ids = np.random.default_rng(0).integers(0, 64, (36, 16))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(folder / "trainer"), max_steps=steps, per_device_train_batch_size=2, use_cpu=True, bf16="weight_dtype" in config,
            save_strategy="steps" if save else "no", save_steps=save or 1, report_to="none", disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        optimizers=(optimizer, schedule.lr_scheduler),
        callbacks=[spectrum.SpectrumCallback(schedule, folder / "spectrum"), witness],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return model, start, witness


@pytest.mark.parametrize("weight_dtype", [None, torch.bfloat16])
def test_values_are_those_of_the_update_and_of_the_first_cycle(weight_dtype, tmp_path):
    plain = {name: p.detach().clone() for name, p in llama().named_parameters()}
    model, start, witness = train(
        tmp_path, **({"weight_dtype": weight_dtype} if weight_dtype else {})
    )
    with_factors = spectrum.measure(model, tmp_path / "spectrum")
    merge_and_unload(model.float())
    found = spectrum.measure(model, tmp_path / "spectrum")
    assert json.loads((tmp_path / "spectrum" / spectrum.VALUES).read_text()) == found
    assert found["r"] == 4 and found["layers"] == 14 == len(found["measured"])
    assert [row["projection"] for row in found["measured"]] == PROJECTIONS * 2
    for row, unmerged in zip(found["measured"], with_factors["measured"]):
        path = row["layer"]
        torch.testing.assert_close(
            start[path], plain[f"{path}.weight"], rtol=2**-14, atol=2**-14 * 0.02
        )
        update = model.get_submodule(path).weight.detach().double() - start[path].double()
        exact = torch.linalg.svdvals(update)
        torch.testing.assert_close(
            torch.tensor(row["relora"]).double(), exact, rtol=1e-4, atol=1e-5
        )
        cycle = torch.linalg.svdvals(witness.cycles[0][path])
        torch.testing.assert_close(torch.tensor(row["cycle"]).double(), cycle, rtol=1e-4, atol=1e-6)
        assert row["cycle"][3] > 1e-3 and not any(row["cycle"][4:])
        torch.testing.assert_close(
            torch.tensor(row["relora"]), torch.tensor(unmerged["relora"]), rtol=1e-3, atol=1e-4
        )
    # Restarts at 3, 6 and 9: three cycles of rank 4 (the fourth has not begun).
    counts = spectrum.figures(found)["up_proj"]
    assert counts["cycle"]["over_1_percent"] == 2 * 4
    assert counts["relora"]["over_1_percent"] == 2 * 12 and counts["relora"]["of"] == 2 * 32
    assert counts["relora"]["entropy_rank"] > counts["cycle"]["entropy_rank"]


def test_a_resumed_run_keeps_what_the_first_part_wrote(tmp_path):
    whole, *_ = train(tmp_path / "a")
    train(tmp_path / "b", steps=5, save=4)
    kept = {p.name: p.read_bytes() for p in (tmp_path / "b" / "spectrum").iterdir()}
    resumed, *_ = train(tmp_path / "b", resume=str(tmp_path / "b" / "trainer" / "checkpoint-4"))
    assert {p.name: p.read_bytes() for p in (tmp_path / "b" / "spectrum").iterdir()} == kept
    values = [
        spectrum.measure(m, tmp_path / d / "spectrum") for m, d in ((whole, "a"), (resumed, "b"))
    ]
    assert values[0] == values[1] and kept.keys() == {spectrum.START, spectrum.CYCLE}


def test_without_a_restart_the_one_cycle_is_the_update(tmp_path):
    model, *_ = train(tmp_path, steps=2)
    for row in spectrum.measure(model, tmp_path / "spectrum")["measured"]:
        a, b = torch.tensor(row["relora"]), torch.tensor(row["cycle"])
        torch.testing.assert_close(a[:4], b[:4], rtol=1e-3, atol=1e-6)


def test_a_full_disk_costs_the_plot_alone(tmp_path, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spectrum, "save_file", full)
    model, _, witness = train(tmp_path)
    assert witness.schedule.cycle == 3
    assert caplog.text.count("no plot of singular values, training goes on") == 2
    assert spectrum.measure(model, tmp_path / "spectrum") is None
    assert [p.name for p in report.plot_metrics([], tmp_path)] == ["loss.png", "learning_rate.png"]


def test_an_update_that_is_not_finite_is_told(tmp_path, caplog):
    model, *_ = train(tmp_path, steps=1)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    assert spectrum.measure(model, tmp_path / "spectrum") is None
    assert "the update of model.layers.1.mlp.up_proj is not finite" in caplog.text


def test_large_models_are_sampled_over_their_depth(tmp_path, monkeypatch):
    monkeypatch.setattr(
        spectrum, "_BUDGET", 3.0 * (4 * 32**3 + 3 * 32 * 32 * 48)
    )  # 3 blocks' worth
    model, *_ = train(tmp_path, model=llama(blocks=5), steps=1)
    found = spectrum.measure(model, tmp_path / "spectrum")
    assert found["layers"] == 35
    blocks = [int(row["layer"].split(".")[2]) for row in found["measured"]]
    assert blocks == [0] * 7 + [2] * 7 + [4] * 7


@pytest.mark.parametrize("preset", PRESETS)
def test_the_cost_is_bounded_for_every_preset(preset):
    shape = {k: int(PRESETS[preset][k]) for k in ("hidden_size", "intermediate_size")}
    config = LlamaConfig(
        vocab_size=8, num_hidden_layers=int(PRESETS[preset]["num_layers"]),
        num_attention_heads=int(PRESETS[preset]["num_heads"]), **shape,
    )  # fmt: skip
    with torch.device("meta"):
        layers = relora_layers(apply_relora(LlamaForCausalLM(config), ReLoRaConfig(r=4)))
    chosen = [layer.weight for _, layer in spectrum._measured(layers)]
    assert sum(w.numel() for w in chosen) * 4 < 1.5e9
    assert len(chosen) == len(layers) or (preset == "1.3b" and len(chosen) == 3 * 7)


def test_figures_of_known_values():
    row = {"layer": "a.q", "projection": "q", "relora": [2.0, 2.0, 0.05, 0.01], "cycle": [0.0] * 4}
    found = spectrum.figures({"measured": [row, row]})["q"]
    assert found["relora"]["over_0.1"] == 4 and found["relora"]["over_1_percent"] == 6
    shares = np.array([2.0, 2.0, 0.05, 0.01]) / 4.06
    rank = 2 * np.exp(-(shares * np.log(shares)).sum())
    assert found["relora"]["entropy_rank"] == pytest.approx(rank)
    assert found["cycle"] == {"over_0.1": 0, "over_1_percent": 0, "entropy_rank": 0.0, "of": 8}


def rows():
    lines = []
    for step in range(1, 9):
        phase = "warm_start" if step < 4 else "relora"
        base = {"phase": phase, "step": step, "tokens": 10 * step, "cycle": None}
        lines.append({**base, "loss": 8.0 - step / 4, "lr": 1e-3})
    lines.append({**base, "eval_loss": 6.5})
    return [*lines, {**base, "restart": True, "lr": 0.0}]


@pytest.mark.parametrize("projections", [1, 2, 7, 9])
def test_plots_of_one_to_many_projections(projections, tmp_path):
    falling = [2.0**-i for i in range(8)]
    measured = [
        {"layer": f"{block}.p{i}", "projection": f"p{i}", "relora": falling, "cycle": [1.0] + [0.0] * 7}
        for block, i in itertools.product(range(2), range(projections))
    ]  # fmt: skip
    found = {"r": 1, "layers": 2 * projections, "measured": measured}
    paths = report.plot_metrics(rows(), tmp_path, found)
    assert [p.name for p in paths] == [
        "loss.png",
        "learning_rate.png",
        "spectrum.png",
        "summary.png",
    ]
    for path in paths:
        pixels = image.imread(path)
        assert pixels.shape[0] > 500 and pixels[..., :3].std() > 0.05  # something is drawn
