"""What a person reads after a run: plots, a table, a sample of text."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_RESTART = {"color": "0.6", "linewidth": 0.8, "linestyle": "--", "zorder": 0}
_BLUE, _ORANGE = "#1f77b4", "#d95f02"


def plot_metrics(rows: list[dict], folder: Path) -> list[Path]:
    """loss.png and learning_rate.png from the rows of metrics.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = {"loss.png": _draw_loss, "learning_rate.png": _draw_learning_rate}
    for name, draw in plots.items():
        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.add_subplot()
        draw(axes, rows)
        _mark_phases(axes, rows)
        figure.savefig(folder / name, dpi=120)
    return [folder / name for name in plots]


def _draw_loss(axes, rows):
    training = [(r["step"], r["loss"]) for r in rows if r.get("loss") is not None]
    validation = [(r["step"], r["eval_loss"]) for r in rows if r.get("eval_loss") is not None]
    axes.plot(*_columns(training), color=_BLUE, alpha=0.4, linewidth=1, label="training")
    axes.plot(*_columns(validation), color=_ORANGE, marker="o", markersize=3, label="validation")
    if validation:
        step, loss = validation[-1]
        axes.annotate(f"{loss:.3f}", (step, loss), (0, 8), textcoords="offset points", ha="right")
    axes.set(title="Loss", ylabel="cross-entropy (nats per token)")


def _draw_learning_rate(axes, rows):
    # A loss row tells the rate that led to its step, a restart row the rate that leads on from it.
    rates = sorted((r["step"] - ("loss" in r), r["lr"]) for r in rows if "lr" in r)
    axes.plot(*_columns(rates), color=_BLUE, linewidth=1.2, label="learning rate")
    axes.set(title="Learning rate", ylabel="learning rate")
    axes.set_ylim(bottom=0)


def _mark_phases(axes, rows):
    """Restarts as dashed lines, the warm start as a grey ground, tokens along the top."""
    for i, row in enumerate(r for r in rows if "restart" in r):
        axes.axvline(row["step"], label=None if i else "restart", **_RESTART)
    warm = [r["step"] for r in rows if r["phase"] == "warm_start"]
    if warm:
        axes.axvspan(0, max(warm), color="0.93", zorder=-1, label="full-rank warm start")
    axes.set_xlabel("optimizer steps")
    axes.set_xlim(left=0, right=max((r["step"] for r in rows), default=1))
    last = rows[-1] if rows else {"step": 1, "tokens": 1}
    millions = last["tokens"] / last["step"] / 1e6
    top = axes.secondary_xaxis("top", functions=(lambda s: s * millions, lambda t: t / millions))
    top.set_xlabel("tokens (millions)")
    axes.legend(loc="upper right", framealpha=1, edgecolor="none")


def _columns(points):
    return [x for x, _ in points], [y for _, y in points]


@torch.no_grad()
def sample_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, seed: int
) -> str:
    """`prompt` continued by up to 64 tokens, drawn at temperature 0.8 from the 40 likeliest."""
    torch.manual_seed(seed)
    positions = model.config.max_position_embeddings
    ids = tokenizer(prompt)["input_ids"][: positions // 2]
    ids = torch.tensor([ids], device=model.device)
    model.eval()
    new = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=min(64, positions - ids.shape[1]),
        do_sample=True,
        temperature=0.8,
        top_k=40,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(new[0])


def losses(rows: list[dict]) -> dict[str, float | None]:
    """Validation loss at the first step, at the end of the warm start, and at the end."""

    def last(rows):
        return rows[-1]["eval_loss"] if rows else None

    validations = [r for r in rows if r.get("eval_loss") is not None]
    return {
        "eval_loss_start": validations[0]["eval_loss"] if validations else None,
        "eval_loss_warm_start": last([r for r in validations if r["phase"] == "warm_start"]),
        "eval_loss_final": last(validations),
    }


def table(summary: dict) -> str:
    """The summary for reading: one line per entry that is neither nested nor long."""
    lines = []
    for name, value in summary.items():
        if isinstance(value, (dict, list)) or name == "sample":
            continue
        if isinstance(value, (int, float)):
            value = f"{value:,.0f}" if value == int(value) or value >= 1000 else f"{value:.4g}"
        lines.append((name.replace("_", " "), "-" if value is None else str(value)))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)
