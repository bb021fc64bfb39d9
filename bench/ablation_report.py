"""The table and the plots of an ablation, from the folders of its runs."""

import csv
import json
import math
import statistics
from pathlib import Path

import torch
from matplotlib.figure import Figure
from safetensors import safe_open

DONOR = "lora"  # whose weights at the start of the second phase every run of its seed shares
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_report(output: Path, runs: list[tuple[str, int]]) -> None:
    """table.md, table.csv and plots/ in `output`; `runs`: (name, seed) of those that are finished."""
    by_name: dict[str, list[dict]] = {}
    for name, seed in runs:
        folder = output / f"{name}-{seed}"
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((folder / "summary.json").read_text())
        run = {"rows": rows, "summary": summary, "spectra": spectra(output, name, seed)}
        by_name.setdefault(name, []).append(run | {"figures": figures(run)})
    table = [table_row(name, found) for name, found in by_name.items()]
    write_table(output, table, by_name)
    plots = output / "plots"
    plots.mkdir(exist_ok=True)
    draw_validation(plots / "validation.png", by_name)
    draw_updates(plots / "updates.png", by_name)
    draw_spectra(plots / "spectrum.png", by_name)


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


def table_row(name: str, found: list[dict]) -> dict:
    row = {"run": name, "seeds": len(found)}
    for title, (key, form) in COLUMNS.items():
        values = [run["figures"][key] for run in found if run["figures"].get(key) is not None]
        row[title] = form.format(statistics.mean(values)) if values else "-"
        if title == "validation loss":
            row["spread"] = f"{max(values) - min(values):.3f}" if len(values) > 1 else "-"
    return row


def figures(run: dict) -> dict[str, float]:
    """What the table shows of one run."""
    rows, found = run["rows"], dict(run["summary"])
    found["perplexity"] = math.exp(found["eval_loss_final"])
    kept = [row["merge_kept"] for row in rows if "merge_kept" in row]
    if kept:
        found["merge_kept"] = statistics.mean(kept)
    after = [u for cycle in updates_after_restarts(rows) for u in cycle]
    if after:
        found["largest_update"] = max(after)
    spectra = run["spectra"]
    if spectra:
        found["entropy_rank"] = statistics.mean(entropy_rank(v) for v in spectra.values())
        found["rank_1_percent"] = statistics.mean(
            sum(x > 0.01 * v[0] for x in v) for v in spectra.values()
        )
    return found


def updates_after_restarts(rows: list[dict]) -> list[list[float]]:
    """Of each cycle but the first, the size of its first updates over the learning rate."""
    cycles: dict[int, list[float]] = {}
    for row in rows:
        if "update" in row and row["cycle"]:
            cycles.setdefault(row["cycle"], []).append(row["update"])
    return list(cycles.values())


def entropy_rank(values: list[float]) -> float:
    """exp of the entropy of the singular values as shares of their sum (Roy and Vetterli, 2007)."""
    shares = [v / sum(values) for v in values if v > 0]
    return math.exp(-sum(s * math.log(s) for s in shares)) if shares else 0.0


def spectra(output: Path, name: str, seed: int) -> dict[str, list[float]]:
    """Per projection, singular values of W_end - W_start, descending, averaged over the layers.

    W_start is the donor's after its warm start, through which the full-rank run passes too. {} where a
    run began elsewhere.
    """
    start = output / f"{DONOR}-{seed}" / "spectrum" / "start.safetensors"
    final = output / f"{name}-{seed}" / "final" / "model.safetensors"
    if "from-scratch" in name or not start.exists() or not final.exists():
        return {}
    sums: dict[str, list[torch.Tensor]] = {}
    with safe_open(start, "pt") as before, safe_open(final, "pt") as after:
        for key in before.keys():
            projection = key.split(".")[-2]
            change = after.get_tensor(key).float() - before.get_tensor(key)
            sums.setdefault(projection, []).append(torch.linalg.svdvals(change))
    return {p: torch.stack(v).mean(0).tolist() for p, v in sums.items() if p in PROJECTIONS}


def write_table(output: Path, table: list[dict], by_name: dict) -> None:
    titles = list(table[0])
    with open(output / "table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, titles)
        writer.writeheader()
        writer.writerows(table)
    any_run = next(iter(by_name.values()))[0]["summary"]
    lines = [
        f"{any_run['model']}, {any_run['tokens']:,} tokens a run, {any_run['corpus']}; "
        f"{any_run['device']}, torch {any_run['versions']['torch']}. Means over seeds; spread: largest "
        "minus smallest.",
        "",
        "| " + " | ".join(titles) + " |",
        "|" + "---|" * len(titles),
        *("| " + " | ".join(str(row[t]) for t in titles) + " |" for row in table),
    ]
    (output / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw_validation(path: Path, by_name: dict) -> None:
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, found) in enumerate(by_name.items()):
        curves: dict[int, list[float]] = {}
        for run in found:
            for row in run["rows"]:
                if row.get("eval_loss") is not None:
                    curves.setdefault(row["step"], []).append(row["eval_loss"])
        steps = sorted(curves)
        means = [statistics.mean(curves[step]) for step in steps]
        style = "-" if i < 10 else "--"
        axes.plot(steps, means, style, label=name, linewidth=1.2)
    restarts = {
        row["step"] for run in by_name.get("relora", []) for row in run["rows"] if "restart" in row
    }
    for i, step in enumerate(sorted(restarts)):
        axes.axvline(step, color="0.7", linewidth=0.8, linestyle=":",
                     label=None if i else "restarts of relora")  # fmt: skip
    ends = [run["figures"]["eval_loss_final"] for found in by_name.values() for run in found]
    axes.set_ylim(min(ends) - 0.1, min(ends) + 2)
    axes.set(title="Validation loss, mean over seeds", xlabel="optimizer steps",
             ylabel="cross-entropy (nats per token)")  # fmt: skip
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=120)


def draw_updates(path: Path, by_name: dict) -> None:
    """The spike after a restart, per way of resetting the moments."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, found in by_name.items():
        cycles = [c for run in found for c in updates_after_restarts(run["rows"])]
        if cycles and (name == "relora" or name.startswith(("reset", "upstream"))):
            length = min(map(len, cycles))
            mean = [statistics.mean(c[i] for c in cycles) for i in range(length)]
            axes.plot(range(1, length + 1), mean, label=name, linewidth=1.2)
    axes.set_yscale("log")
    axes.set(title="Size of the first updates after a restart", xlabel="steps after the restart",
             ylabel="root mean square of the change / learning rate")  # fmt: skip
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def draw_spectra(path: Path, by_name: dict) -> None:
    figure = Figure(figsize=(14, 7), layout="constrained")
    grid = figure.subplots(2, 4)
    for axes, projection in zip(grid.flat, PROJECTIONS):
        for name in ("full-rank", "lora", "relora"):
            found = [run["spectra"][projection] for run in by_name.get(name, []) if run["spectra"]]
            if found:
                mean = [statistics.mean(values) for values in zip(*found)]
                axes.plot(range(1, len(mean) + 1), mean, label=name, linewidth=1.2)
        axes.set_yscale("log")
        axes.set(title=projection, xlabel="index", ylabel="singular value")
    grid.flat[-1].set_axis_off()
    grid.flat[0].legend()
    figure.suptitle("Singular values of W_end - W_start, mean over layers and seeds")
    figure.savefig(path, dpi=120)
