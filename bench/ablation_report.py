"""The table and the plots of an ablation, from the folders of its runs."""

import csv
import itertools
import json
import math
import re
import statistics
from pathlib import Path

import torch
import yaml
from matplotlib.figure import Figure
from safetensors import safe_open

from relora_kernels.train.output import RunFolder

DONOR = "lora"  # the full-rank run passes through its warm start, too
FULL = "full-rank"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_report(output: Path, runs: list[tuple[str, int]]) -> None:
    """Write table.md, table.csv, runs.csv and plots/ into `output`; `runs`: (name, seed) of those that
    finished or gave up."""
    by_name: dict[str, dict[int, dict]] = {}
    for name, seed in runs:
        folder = output / f"{name}-{seed}"
        rows = RunFolder(folder).rows()
        if (folder / "summary.json").exists():
            summary = json.loads((folder / "summary.json").read_text())
        else:
            summary = cut_short(folder, rows)
        run = {"rows": rows, "summary": summary, "spectra": spectra(output, name, seed)}
        by_name.setdefault(name, {})[seed] = run | {"figures": figures(run)}
    table = [table_row(name, by_name) for name in by_name]
    write_csv(output / "table.csv", table)
    write_csv(output / "runs.csv", [
        {"run": name, "seed": seed} | {t: run["figures"].get(key) for t, (key, _) in COLUMNS.items()}
        | {"diverged at step": run["figures"].get("diverged_at")}
        for name, found in by_name.items() for seed, run in found.items()
    ])  # fmt: skip
    write_markdown(output / "table.md", table, by_name)
    plots = output / "plots"
    plots.mkdir(exist_ok=True)
    draw_validation(plots / "validation.png", by_name)
    draw_updates(plots / "updates.png", by_name)
    draw_spectra(plots / "spectrum.png", by_name)
    draw_kept(plots / "kept.png", by_name)
    draw_sweeps(plots / "sweeps.png", by_name)


def cut_short(folder: Path, rows: list[dict]) -> dict:
    """As much of a summary as there is for a run that gave up."""
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    memory = [row["peak_memory"] for row in rows if "peak_memory" in row]
    return {
        "settings": yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")),
        "restarts": sum("restart" in row for row in rows),
        **({"tokens_per_second": statistics.median(speeds)} if speeds else {}),
        **({"peak_memory_mib": max(memory)} if memory else {}),
    }


def diverged_at(rows: list[dict]) -> int | None:
    """The step from which on all steps were skipped for their gradients, or else no validation loss was
    finite; None if neither holds at the end."""
    skipped = {row["step"] for row in rows if "skipped" in row}
    step = rows[-1]["step"] if rows else 0
    while step in skipped and step - 1 in skipped:
        step -= 1
    if step in skipped:
        return step
    losses = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    lost = list(itertools.takewhile(lambda row: row[1] is None, reversed(losses)))
    return lost[-1][0] if lost else None


COLUMNS = {
    "validation loss": ("eval_loss_final", "{:.3f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "tokens/s": ("tokens_per_second", "{:,.0f}"),
    "peak memory, MiB": ("peak_memory_mib", "{:,.0f}"),
    "restarts": ("restarts", "{:.0f}"),
    "entropy rank of the update": ("entropy_rank", "{:.1f}"),
    "singular values > 1 %": ("rank_1_percent", "{:.1f}"),
    "kept by a merge": ("merge_kept", "{:.3f}"),
    "largest update / lr": ("largest_update", "{:.2f}"),
}


def table_row(name: str, by_name: dict) -> dict:
    found = by_name[name]
    row = {"run": name, "seeds": len(found)}
    for title, (key, form) in COLUMNS.items():
        values = [run["figures"][key] for run in found.values() if key in run["figures"]]
        row[title] = form.format(statistics.mean(values)) if values else "-"
        if title == "validation loss":
            steps = [run["figures"].get("diverged_at") for run in found.values()]
            if steps := [str(step) for step in steps if step is not None]:
                row[title] += f", diverged at step {' and '.join(steps)}"
            row["spread"] = f"{max(values) - min(values):.3f}" if len(values) > 1 else "-"
            for other in (FULL, DONOR):
                row[f"above {other}"] = difference(found, by_name.get(other, {}))
    return row


def difference(found: dict, others: dict) -> str:
    """Mean and range of the differences between final losses, seed by seed."""
    values = [
        found[seed]["figures"]["eval_loss_final"] - others[seed]["figures"]["eval_loss_final"]
        for seed in found
        if seed in others and others[seed] is not found[seed]
    ]
    if len(values) < 2:
        return f"{values[0]:+.3f}" if values else "-"
    return f"{statistics.mean(values):+.3f} ({min(values):+.3f} to {max(values):+.3f})"


def figures(run: dict) -> dict[str, float]:
    """What the table shows of one run."""
    rows, found = run["rows"], dict(run["summary"])
    # From the rows, with NaN for null; the summary holds None then. A run that gave up has none.
    losses = [finite(row["eval_loss"]) for row in rows if "eval_loss" in row]
    found["eval_loss_final"] = losses[-1] if "eval_loss_final" in found else math.nan
    if math.isnan(found["eval_loss_final"]):
        found["diverged_at"] = diverged_at(rows)
    found["perplexity"] = math.exp(found["eval_loss_final"])
    kept = [finite(row["merge_kept"]) for row in rows if "merge_kept" in row]
    if kept:
        found["merge_kept"] = statistics.mean(kept)
    after = [u for cycle in updates_after_restarts(rows) for u in cycle.values()]
    if after:
        found["largest_update"] = math.nan if any(map(math.isnan, after)) else max(after)
    layers = [values for found in run["spectra"].values() for values in found]
    if layers:
        found["entropy_rank"] = statistics.mean(map(entropy_rank, layers))
        found["rank_1_percent"] = statistics.mean(
            sum(x > 0.01 * values[0] for x in values) for values in layers
        )
    return found


def finite(value: float | None) -> float:
    """A number from metrics.jsonl, where null stands for NaN or inf."""
    return math.nan if value is None else value


def updates_after_restarts(rows: list[dict]) -> list[dict[int, float]]:
    """For each cycle but the first: step after the restart -> size of its update / learning rate."""
    restarts = {row["cycle"]: row["step"] for row in rows if "restart" in row}
    cycles: dict[int, dict[int, float]] = {cycle: {} for cycle in restarts}
    for row in rows:
        if "update" in row and row["cycle"]:
            cycles[row["cycle"]][row["step"] - restarts[row["cycle"]]] = finite(row["update"])
    return list(cycles.values())


def entropy_rank(values: list[float]) -> float:
    """exp of the entropy of the singular values as shares of their sum (Roy and Vetterli, 2007)."""
    shares = [v / sum(values) for v in values if v > 0]
    return math.exp(-sum(s * math.log(s) for s in shares)) if shares else 0.0


def spectra(output: Path, name: str, seed: int) -> dict[str, list[list[float]]]:
    """Per projection, each layer's singular values of W_end - W_start, descending.

    As measured by the run itself, with W_start after its own warm start. A full-rank run has none:
    they are computed from its final weights and the donor's start. {} if neither is there.
    """
    folder = output / f"{name}-{seed}"
    found: dict[str, list[list[float]]] = {}
    measured = folder / "spectrum" / "singular_values.json"
    if measured.exists():
        for layer in json.loads(measured.read_text())["measured"]:
            found.setdefault(layer["projection"], []).append(layer["relora"])
        return found
    start = output / f"{DONOR}-{seed}" / "spectrum" / "start.safetensors"
    final = folder / "final" / "model.safetensors"
    if start.exists() and final.exists():
        with safe_open(start, "pt") as before, safe_open(final, "pt") as after:
            for key in before.keys():
                change = after.get_tensor(key).float() - before.get_tensor(key)
                found.setdefault(key.split(".")[-2], []).append(
                    torch.linalg.svdvals(change).tolist()
                )
    return found


def write_csv(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_markdown(path: Path, table: list[dict], by_name: dict) -> None:
    titles = list(table[0])
    summaries = (run["summary"] for found in by_name.values() for run in found.values())
    made = "No run has come to its end. "
    if run := next((summary for summary in summaries if "model" in summary), None):
        made = (
            f"{run['model']}, {run['tokens']:,} tokens a run, {run['corpus']}; {run['device']}, torch "
            f"{run['versions']['torch']}. "
        )
    lines = [
        f"{made}Means over seeds; spread: largest "
        "minus smallest; above: differences seed by seed, mean and range. Ranks: means over all layers "
        "of W_end - W_start. Memory: allocated on a GPU, on a CPU that of the process. Tokens/s: median "
        "over the run, as the machine was loaded then.",
        "",
        "| " + " | ".join(titles) + " |",
        "|" + "---|" * len(titles),
        *("| " + " | ".join(str(row[t]) for t in titles) + " |" for row in table),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


# Panel -> how the names of its runs begin. Those in ALWAYS are in every panel, for comparison.
PANELS = {
    "What ReLoRA is made of": ("lora-from", "relora-from", "relora-no"),
    "Moments at a restart": ("reset",),
    "bf16 weights": ("bf16", "upstream"),
    "Sweeps": ("lora-", "relora-"),
}
ALWAYS = {FULL: "-", "lora": "--", "relora": "-."}


def panels(by_name: dict) -> dict[str, list[str]]:
    """Each run in the first panel that matches its name, together with those that are in all."""
    left = [name for name in by_name if name not in ALWAYS]
    found = {}
    for title, starts in PANELS.items():
        mine = [name for name in left if name.startswith(starts)]
        left = [name for name in left if name not in mine]
        if mine:
            found[title] = [*(n for n in ALWAYS if n in by_name), *mine]
    return found or {"Runs": list(by_name)}


def draw_validation(path: Path, by_name: dict) -> None:
    chosen = panels(by_name)
    figure = Figure(figsize=(7 * len(chosen), 6), layout="constrained")
    restarts = {row["step"] for run in by_name.get("relora", {}).values()
                for row in run["rows"] if "restart" in row}  # fmt: skip
    ends = [
        run["figures"]["eval_loss_final"] for found in by_name.values() for run in found.values()
    ]
    ends = sorted(filter(math.isfinite, ends)) or [0.0]
    top = max(statistics.quantiles(ends, n=4)[2], ends[0] + 0.5) + 0.3 if len(ends) > 1 else None
    first = []  # steps at which a curve comes into view
    for axes, (title, names) in zip(
        figure.subplots(1, len(chosen), squeeze=False)[0], chosen.items()
    ):
        for name in names:
            curves: dict[int, list[float]] = {}
            for run in by_name[name].values():
                for row in run["rows"]:
                    if "eval_loss" in row:
                        curves.setdefault(row["step"], []).append(finite(row["eval_loss"]))
            steps = sorted(curves)
            style = {"color": "0.2", "linestyle": ALWAYS[name]} if name in ALWAYS else {}
            end = statistics.mean(r["figures"]["eval_loss_final"] for r in by_name[name].values())
            means = [statistics.mean(curves[step]) for step in steps]
            axes.plot(steps, means, label=f"{name} {end:.3f}", linewidth=1.2, **style)
            first += [a for a, mean in zip(steps, means[1:]) if top and mean < top][:1]
        for i, step in enumerate(sorted(restarts)):
            axes.axvline(step, color="0.8", linewidth=0.8, linestyle=":",
                         label=None if i else "restarts of relora")  # fmt: skip
        axes.set_ylim(ends[0] - 0.1, top)
        axes.set(title=title, xlabel="optimizer steps")
        axes.legend(fontsize=8, title="final; what is above is cut off", title_fontsize=8)
    for axes in figure.axes:
        axes.set_xlim(left=min(first, default=None))
    figure.axes[0].set_ylabel("validation loss (nats per token), mean over seeds")
    figure.savefig(path, dpi=100)


def draw_updates(path: Path, by_name: dict) -> None:
    """The spike after a restart, per way of resetting the moments."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, found in by_name.items():
        cycles = [c for run in found.values() for c in updates_after_restarts(run["rows"])]
        if cycles and (name == "relora" or name.startswith(("reset", "upstream"))):
            steps = sorted(set().union(*cycles))
            mean = [statistics.mean(c[step] for c in cycles if step in c) for step in steps]
            axes.plot(steps, mean, label=name, linewidth=1.2)
    axes.set_yscale("log")
    axes.set(title="Size of the first updates after a restart, mean over restarts and seeds",
             xlabel="step after the restart (in the first the learning rate is 0)",
             ylabel="root mean square of the change / learning rate")  # fmt: skip
    if axes.lines:
        axes.legend(fontsize=8)
        figure.savefig(path, dpi=120)


def draw_spectra(path: Path, by_name: dict) -> None:
    figure = Figure(figsize=(14, 7), layout="constrained")
    grid = figure.subplots(2, 4)
    for axes, projection in zip(grid.flat, PROJECTIONS):
        for name in ("full-rank", "lora", "relora"):
            runs = by_name.get(name, {}).values()
            found = [layer for run in runs for layer in run["spectra"].get(projection, [])]
            if found:
                mean = [statistics.mean(values) for values in zip(*found)]
                axes.plot(range(1, len(mean) + 1), mean, label=name, linewidth=1.2)
        axes.set_yscale("log")
        # Anything below is rounding: an update of rank r ends abruptly.
        axes.set_ylim(1e-4 * max((y.get_ydata()[0] for y in axes.lines), default=1.0))
        axes.set(title=projection, xlabel="index", ylabel="singular value")
    grid.flat[-1].set_axis_off()
    if lines := grid.flat[0].lines:
        grid.flat[-1].legend(handles=list(lines), loc="center")
        figure.suptitle("Singular values of W_end - W_start, mean over layers and seeds")
        figure.savefig(path, dpi=120)


def draw_kept(path: Path, by_name: dict) -> None:
    """The share of its update that each merge kept, per rounding of bf16 weights."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, found in by_name.items():
        kept: dict[int, list[float]] = {}
        for run in found.values():
            for row in run["rows"]:
                if "merge_kept" in row:
                    kept.setdefault(row["step"], []).append(finite(row["merge_kept"]))
        if kept and run["summary"]["settings"]["bf16"]:
            axes.plot(kept.keys(), map_mean(kept), marker="o", markersize=3, label=name)
    axes.set(title="Share of s B A that a merge leaves in W (projection)", xlabel="optimizer steps")
    axes.axhline(1.0, color="0.8", linewidth=0.8)
    axes.set_ylim(0, max(1.1, axes.get_ylim()[1]))  # show shares, not their fourth decimal
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
        figure.savefig(path, dpi=100)


def map_mean(lists: dict) -> list[float]:
    return [statistics.mean(values) for values in lists.values()]


# Key in the names of a sweep's runs -> label, and the value of the run without one in its name.
SWEEPS = {
    "r": ("rank of a cycle", lambda settings: settings["lora_r"]),
    "cycle": ("steps between merges", lambda settings: settings["cycle_steps"]),
    "lr": ("learning rate, times the warm start's", lambda settings: 1),
}


def draw_sweeps(path: Path, by_name: dict) -> None:
    """Final loss over rank, cycle length and learning rate; the runs are named <kind>-<key><number>."""
    figure = Figure(figsize=(15, 5), layout="constrained")
    for axes, (key, (label, default)) in zip(figure.subplots(1, 3, sharey=True), SWEEPS.items()):
        points: dict[str, dict[float, list[float]]] = {}
        for name in by_name:
            if match := re.fullmatch(rf"(\w+)-{key}([\d.]+)", name):
                points.setdefault(match[1], {})[float(match[2])] = final_losses(by_name[name])
        for kind in points.keys() & by_name.keys():
            settings = next(iter(by_name[kind].values()))["summary"]["settings"]
            points[kind][default(settings)] = final_losses(by_name[kind])
        for kind, losses in points.items():
            losses = dict(sorted(losses.items()))
            axes.plot(losses.keys(), map_mean(losses), marker="o", label=kind)
        for name, style in ((FULL, "--"), (DONOR, ":")):
            if name in by_name and points:
                end = statistics.mean(final_losses(by_name[name]))
                axes.axhline(end, color="0.5", linestyle=style, label=f"{name} of the core grid")
        axes.set(xlabel=label, xscale="log")
        if points:
            ticks = sorted({number for losses in points.values() for number in losses})
            axes.set_xticks(ticks, [f"{number:g}" for number in ticks])
            axes.minorticks_off()
            axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("final validation loss, mean over seeds")
    if any(axes.lines for axes in figure.axes):
        figure.savefig(path, dpi=100)


def final_losses(found: dict) -> list[float]:
    return [run["figures"]["eval_loss_final"] for run in found.values()]
