"""What a person reads after a run: plots, a table, a sample of text."""

from pathlib import Path

import numpy as np
import torch
from matplotlib import image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .spectrum import figures

_RESTART = {"color": "0.6", "linewidth": 0.8, "linestyle": "--", "zorder": 0}
_BLUE, _ORANGE = "#1f77b4", "#d95f02"
_KINDS = (("relora", _BLUE, "ReLoRA, all cycles"), ("cycle", _ORANGE, "its first cycle"))
_FLOOR = 1e-4  # of the largest singular value; zeros are drawn here


def plot_metrics(rows: list[dict], folder: Path, spectrum: dict | None = None) -> list[Path]:
    """Write loss.png and learning_rate.png from the rows of metrics.jsonl. Given the result of
    spectrum.measure, also spectrum.png, and summary.png with all three on one page."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {}
    for name, draw in (("loss.png", _draw_loss), ("learning_rate.png", _draw_learning_rate)):
        figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
        axes = figure.add_subplot()
        draw(axes, rows)
        _mark_phases(axes, rows)
        pages[name] = _pixels(figure)
    if spectrum:
        figure = Figure(figsize=(18, 8), dpi=120, layout="constrained")  # as wide as the two above
        _draw_spectrum(figure, spectrum)
        curves = np.hstack(list(pages.values()))
        pages["spectrum.png"] = _pixels(figure)
        pages["summary.png"] = np.vstack([curves, pages["spectrum.png"]])
    for name, page in pages.items():
        image.imsave(folder / name, page)
    return [folder / name for name in pages]


def _pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


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
    # A loss row holds the rate that led to its step, a restart row the rate of the following step.
    rates = sorted((r["step"] - ("loss" in r), r["lr"]) for r in rows if "lr" in r)
    axes.plot(*_columns(rates), color=_BLUE, linewidth=1.2, label="learning rate")
    axes.set(title="Learning rate", ylabel="learning rate")
    axes.set_ylim(bottom=0)


def _mark_phases(axes, rows):
    """Restarts as dashed lines, the warm start as a grey background, tokens along the top."""
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


_PANELS = 7  # projections shown: a Llama has as many


def _draw_spectrum(figure, spectrum):
    """One panel per projection, and bars: how many singular values exceed 1 % of the largest."""
    measured, r = spectrum["measured"], spectrum["r"]
    projections = list(dict.fromkeys(row["projection"] for row in measured))[:_PANELS]
    grid = figure.subplots(2, -(-(len(projections) + 1) // 2), squeeze=False)
    *panels, bars = list(grid.flat)[: len(projections) + 1]
    for axes in list(grid.flat)[len(projections) + 1 :]:
        axes.remove()
    top = max(row["relora"][0] for row in measured) or 1.0
    floor = _FLOOR * top
    for axes, projection in zip(panels, projections):
        for kind, color, label in _KINDS:
            values = torch.tensor(
                [row[kind] for row in measured if row["projection"] == projection]
            )
            low, median, high = values.amin(0), values.median(0).values, values.amax(0)
            numbers = range(1, len(median) + 1)
            axes.plot(numbers, median.clamp_min(floor), color=color, linewidth=1.6, label=label)
            axes.fill_between(
                numbers, low.clamp_min(floor), high.clamp_min(floor), color=color, alpha=0.2,
                linewidth=0,
            )  # fmt: skip
        axes.axvline(r, label=f"rank of a cycle ({r})", **_RESTART)
        axes.set(title=projection, yscale="log", xlim=(0, len(median)), ylim=(floor, 2 * top))
        axes.yaxis.minorticks_off()
    for axes in grid[:, 0]:
        axes.set_ylabel("singular value")
    for axes in panels[grid.shape[1] - 1 :] or panels:
        axes.set_xlabel("number of the singular value")
    panels[0].legend(loc="upper right", fontsize="small", framealpha=1, edgecolor="none")
    _draw_counts(bars, figures(spectrum), projections)
    layers, shown = spectrum["layers"], len(measured)
    which = f"all {layers} layers" if shown == layers else f"{shown} of {layers} layers"
    figure.suptitle(
        f"Singular values of the update W_end - W_start: median and range over {which}, "
        f"one LoRA cycle of rank {r} for comparison"
    )


def _draw_counts(axes, table, projections):
    places = torch.arange(len(projections))
    for shift, (kind, color, _) in zip((0.2, -0.2), _KINDS):
        counts = [
            100 * table[p][kind]["over_1_percent"] / table[p][kind]["of"] for p in projections
        ]
        bars = axes.barh(places - shift, counts, 0.4, color=color)
        axes.bar_label(bars, fmt="%.0f %%", padding=2, fontsize="small")
    axes.set_yticks(places, projections)
    axes.invert_yaxis()
    axes.set(title="above 1 % of the largest", xlim=(0, 118), xlabel="share of all singular values")
    axes.set_xticks(range(0, 101, 25), [f"{n} %" for n in range(0, 101, 25)])


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
    """Validation loss at the first step, at the end of the warm start, and at the end; None if it was
    not finite or not measured."""

    def last(rows):
        return rows[-1]["eval_loss"] if rows else None

    validations = [r for r in rows if "eval_loss" in r]
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
