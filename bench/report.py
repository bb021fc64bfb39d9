"""python bench/report.py RESULTS.json ... [--output FOLDER] [--readme README.md]

Reads what `pytest bench/ --benchmark-only --benchmark-json=RESULTS.json` or bench/gpu_check.py wrote; prints
the ratio table and the bars that the project sets itself, in Markdown; draws roofline.png, speedup.png and
memory.png into FOLDER, from the last file. --readme writes our times beside those of the usual code between
`<!-- figures -->` and `<!-- /figures -->`; a problem that several files hold is taken from the last of them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import sys
from pathlib import Path

BASELINES = ("frozen linear", "device copy")
EAGER = ("eager LoRA", "eager merge", "torch.quantile loop", "by hand")
TWO_CALLS, FULL_RANK = "two-call order", "full-rank nn.Linear"
CHAINS = ("addmm chain, P saved", "addmm chain, P recomputed")
MARKS = ("<!-- figures -->", "<!-- /figures -->")


@dataclasses.dataclass
class Results:
    machine: dict
    date: str
    command: str
    rows: list[dict]  # as measure.run's records, with "row" and "group"

    @property
    def on_gpu(self) -> bool:
        return str(self.machine.get("capability", "")).startswith("sm_")

    @property
    def source(self) -> str:
        """One line that says where the figures come from."""
        m = self.machine
        return (
            f"{m['device']}, driver {m['driver']}, torch {m['torch']}, triton {m['triton']}; {self.date}, "
            f"commit {m['commit'][:12]}{'+' if m['commit'].endswith('+') else ''}; `{self.command}`"
        )


def load(path: Path) -> Results:
    """Load either kind of file. Raises ValueError for anything else."""
    with whole(path):
        results = _load(Path(path))
        results.source, groups(results.rows)  # what every table needs
        return results


@contextlib.contextmanager
def whole(path: Path):
    """Raise ValueError for a file that lacks something, or has a time that is 0 or not a number."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ZeroDivisionError, json.JSONDecodeError) as error:
        raise ValueError(f"expected whole results in {path}; {error!r} is amiss") from error


def _load(path: Path) -> Results:
    content = json.loads(path.read_text(encoding="utf-8"))
    if "benchmarks" in content:
        rows = [
            {**b["extra_info"], "wall_s": b["stats"]["median"]}
            for b in content["benchmarks"]
            if "row" in b["extra_info"]
        ]
        command = "pytest bench/ --benchmark-only"
        return Results(content["machine_info"], content["datetime"][:10], command, rows)
    if "cases" in content:
        rows = [r for r in content["cases"].values() if r["status"] == "ok"]
        only = content.get("only", [])  # not in earlier files
        command = " ".join(["python bench/gpu_check.py", *(["--only"] if only else []), *only])
        return Results(content["machine"], content["date"], command, rows)
    raise ValueError(
        f"expected {path} to be the JSON of pytest-benchmark or of bench/gpu_check.py, got neither "
        f"'benchmarks' nor 'cases' in it"
    )


def relative(row: dict) -> float:
    """Time over the baseline's, measured in turns with it; without a baseline, the time itself."""
    return row["median_s"] / row.get("baseline_s", 1.0)


def groups(rows: list[dict]) -> dict[str, dict[str, dict]]:
    """Group -> row name -> row, in the order of the file."""
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        found.setdefault(row["group"], {})[row["row"]] = row
    return found


# ---- Tables ---------------------------------------------------------------------------------------


def ratio_table(rows: list[dict]) -> str:
    """Each row's time, also relative to the baseline and the eager formula, with floor, error, memory.

    On a GPU, the time is by the device's clock; "with Python's part" is the time that a caller sees.
    """
    lines = []
    for group, members in groups(rows).items():
        eager = next((members[name] for name in EAGER if name in members), None)
        in_us = max(row["median_s"] for row in members.values()) < 1e-3
        unit, scale = ("µs", 1e6) if in_us else ("ms", 1e3)
        lines += [
            f"\n**{group}**\n",
            f"| | {unit} | with Python's part | of the baseline | of eager | of the floor reached | error "
            "| peak MiB |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for name, row in members.items():
            of_floor = "fraction_of_floor" in row  # the op's floor, not a baseline's
            cells = [
                f"{scale * row['median_s']:.4g}",
                f"{scale * row['wall_s']:.4g}" if "wall_s" in row else "",
                f"{relative(row):.3f}" if "baseline_s" in row else "",
                f"{row.get('ratio_to_by_hand', relative(row) / relative(eager)):.3f}"
                if eager
                else "",
                f"{row['fraction_of_floor']:.0%}" if of_floor and name not in BASELINES else "",
                f"{row['error']:.2g}" if row.get("error") is not None else "",
                f"{row['peak_bytes'] / 2**20:.0f}" if row.get("peak_bytes") is not None else "",
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines).strip() + "\n"


def train_table(rows: list[dict]) -> str:
    """Tokens/s and peak memory of train steps."""
    lines = [
        "| model | step | microbatch | tokens/s | of full-rank | peak GiB |",
        "|---|---|--:|--:|--:|--:|",
    ]
    steps = [row for row in rows if "tokens_per_s" in row]
    for row in steps:
        full = next(
            (r for r in steps if r["group"] == row["group"] and r["row"] == "full-rank"), None
        )
        speed = f"{row['tokens_per_s'] / full['tokens_per_s']:.2f}" if full else ""
        peak = "" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 2**30:.2f}"
        lines.append(
            f"| {row['group'].removeprefix('train step ')} | {row['row']} | {row['microbatch']} | "
            f"{row['tokens_per_s']:,.0f} | {speed} | {peak} |"
        )
    return "\n".join(lines) + "\n" if steps else ""


def bars_table(found: list[Bar]) -> str:
    lines = ["| bar | target | measured | met |", "|---|---|---|---|"]
    for bar in found:
        met = {True: "yes", False: "**no**", None: "not measured"}[bar.met]
        lines.append(f"| {bar.name} | {bar.target} | {bar.measured} | {met} |")
    return "\n".join(lines) + "\n"


# ---- Bars -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Bar:
    name: str
    target: str
    measured: str
    met: bool | None


def ours(members: dict[str, dict]) -> dict[str, dict]:
    return {name: row for name, row in members.items() if name.startswith("ours ")}


def best(members: dict[str, dict]) -> dict:
    return min(members.values(), key=relative)


def bars(results: Results) -> list[Bar]:
    """The project's own speed targets, each at the shape where it is worst. All but the layer's
    overhead are for an H200: a CPU's times say nothing about them."""
    rows = results.rows if results.on_gpu else []
    linear = _linear_bars([row for row in rows if _kind(row) == "Linear"])
    return (
        linear
        + _merge_bars(rows)
        + _prune_bars(rows)
        + _layer_bars(results.rows)
        + _step_bars(rows)
    )


def _kind(row: dict) -> str:
    return row.get("problem", {}).get("kind", "")


def _limit(name: str, target: float, ratios: dict[str, float], at_least: bool = False) -> Bar:
    """A bar on a ratio that has to hold at every shape."""
    words = f"{'>=' if at_least else '<='} {target:g}"
    if not ratios:
        return Bar(name, words, "", None)
    where = (min if at_least else max)(ratios, key=ratios.get)
    worst = ratios[where]
    met = worst >= target if at_least else worst <= target
    return Bar(name, words, f"{worst:.3f} at {where} ({len(ratios)} measured)", met)


def _linear_bars(rows: list[dict]) -> list[Bar]:
    at_16k = [
        row
        for row in rows
        if row["problem"]["tokens"] == 16384 and row["problem"]["r"] == 128
    ]  # fmt: skip
    by_direction: dict[str, dict[str, dict[str, dict]]] = {}
    for row in at_16k:
        p = row["problem"]
        shape = f"{p['in_features']} to {p['out_features']}"
        by_direction.setdefault(p["direction"], {}).setdefault(shape, {})[row["row"]] = row

    def over(direction: str, names, shapes=None) -> dict[str, float]:
        """Best of ours over the best of `names`, shape by shape."""
        found = {}
        for shape, members in by_direction.get(direction, {}).items():
            theirs = {n: members[n] for n in names if n in members}
            if ours(members) and theirs and (shapes is None or shape in shapes):
                found[shape] = relative(best(ours(members))) / relative(best(theirs))
        return found

    square = ["4096 to 4096"]
    both, forward = "forward + backward", "forward"
    peers = ["eager LoRA", "PEFT", *CHAINS, TWO_CALLS]
    odd = {}
    for direction in (both, forward):
        shapes = by_direction.get(direction, {})
        for bad, good in (("2048 to 5461", "2048 to 5464"), ("5461 to 2048", "5464 to 2048")):
            if ours(shapes.get(bad, {})) and ours(shapes.get(good, {})):
                times = [best(ours(shapes[s]))["median_s"] for s in (bad, good)]
                odd[f"{bad}, {direction}"] = times[0] / times[1]
    unrepeatable = [
        f"{row['row']}, {row['group']}"
        for row in rows
        if row["row"].startswith("ours ") and row.get("repeatable") is False
    ]
    checked = any(row["row"].startswith("ours ") for row in rows)
    loops = {}  # of the best backend, without the rows that vary one of its constants
    for shape, members in by_direction.get("main loop", {}).items():
        if backends := {name: row for name, row in ours(members).items() if "," not in name}:
            loops[shape] = 1 / relative(best(backends))
    return [
        _limit("forward + backward over eager LoRA", 0.80, over(both, EAGER)),
        _limit("forward + backward over the addmm chain", 0.97, over(both, CHAINS)),
        _limit("forward + backward over the two-call order", 1.0, over(both, [TWO_CALLS])),
        _limit("forward over the frozen GEMM, 4096 squared", 1.09, over(forward, BASELINES, square)),
        _limit("forward over the two-call order", 0.97, over(forward, [TWO_CALLS])),
        _limit(
            "forward + backward over full rank, 4096 squared", 0.77, over(both, [FULL_RANK], square)
        ),
        _limit("forward + backward over the best peer", 0.90, over(both, peers)),
        _limit("time at 5461 over that at 5464", 1.15, odd),
        _limit("main loop alone, of cuBLAS's speed", 0.98, loops, at_least=True),
        Bar(
            "gradients bitwise repeatable", "all", "; ".join(unrepeatable) or ("all" if checked else ""),
            not unrepeatable if checked else None,
        ),
    ]  # fmt: skip


def _copy_share(members: dict[str, dict]) -> float:
    """Needed bytes per second, relative to those of the device copy measured in turns with it."""
    row = best(ours(members))
    copied = 2 * sum(out * in_ for out, in_ in row["problem"]["shapes"])
    copied *= {"float32": 4}.get(row["problem"]["dtype"], 2)
    return (row["bytes"] / row["median_s"]) / (copied / row["baseline_s"])


def _merge_bars(rows: list[dict]) -> list[Bar]:
    shares = {}
    for group, members in groups([row for row in rows if _kind(row) == "Merge"]).items():
        problem = next(iter(members.values()))["problem"]
        large = sum(out * in_ for out, in_ in problem["shapes"]) >= 2048**2
        as_configured = problem["rounding"] == "nearest" and not problem.get("by")
        if large and as_configured and problem["r"] <= 128 and ours(members):
            shares[group.removeprefix("merge nearest ")] = _copy_share(members)
    return [
        _limit("merge, of the device's copy rate (Triton's bar)", 0.80, shares, at_least=True),
        _limit("merge, of the device's copy rate (CUDA's bar)", 0.88, shares, at_least=True),
    ]


def _prune_bars(rows: list[dict]) -> list[Bar]:
    floor, model_ms, faster, memory = {}, {}, {}, {}
    for group, members in groups([row for row in rows if _kind(row) == "Prune"]).items():
        if not ours(members):
            continue
        row, name = best(ours(members)), group.removeprefix("prune ")
        sizes, itemsize = row["problem"]["sizes"], {"float32": 4}.get(row["problem"]["dtype"], 2)
        floor[name] = 1 / row["fraction_of_floor"]
        if row.get("peak_bytes") is not None:
            memory[name] = row["peak_bytes"] / (itemsize * sum(sizes))
        if len(sizes) == 336 and row["problem"]["paired"]:
            model_ms[name] = 1e3 * row["median_s"]
        if len(sizes) == 336 and "torch.quantile loop" in members:
            faster[name] = relative(members["torch.quantile loop"]) / relative(row)
    return [
        _limit("prune over its two-read floor (Triton's bar)", 1.5, floor),
        _limit("prune over its two-read floor (CUDA's bar)", 1.2, floor),
        _limit("prune of the 1.3B model's LoRA moments, ms", 1.0, model_ms),
        _limit(
            "times faster than the torch.quantile loop (Triton's bar)", 50, faster, at_least=True
        ),
        _limit(
            "times faster than the torch.quantile loop (CUDA's bar)", 100, faster, at_least=True
        ),
        _limit("prune's extra memory over the tensors'", 0.02, memory),
    ]


def _layer_bars(rows: list[dict]) -> list[Bar]:
    layer = {
        row["group"].removeprefix("layer: "): row["ratio_to_by_hand"]
        for row in rows
        if row["group"].startswith("layer: ") and row["row"] == "FusedReLoRaLinear"
    }
    return [_limit("FusedReLoRaLinear over the same formula by hand", 1.05, layer)]


def _step_bars(rows: list[dict]) -> list[Bar]:
    speed, saved = {}, {}
    steps = groups([row for row in rows if "tokens_per_s" in row])
    for group, members in steps.items():
        if "ours" in members and "full-rank" in members:
            full, mine = members["full-rank"], members["ours"]
            name = group.removeprefix("train step ")
            speed[name] = mine["tokens_per_s"] / full["tokens_per_s"]
            if "1.3b" in group and "equal" in group and mine.get("peak_bytes") is not None:
                saved[name] = (full["peak_bytes"] - mine["peak_bytes"]) / 1e9
    return [
        _limit("train step, tokens/s over full rank", 1.09, speed, at_least=True),
        _limit("train step, GB less than full rank (1.3B)", 5.5, saved, at_least=True),
    ]


# ---- Plots ----------------------------------------------------------------------------------------


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw roofline.png, speedup.png and memory.png, as far as the rows suffice."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, plot in (("roofline", _roofline), ("speedup", _speedup), ("memory", _memory)):
        figure = plot(plt, results)
        if figure is not None:
            figure.text(0.01, 0.005, results.source.replace("`", ""), fontsize=6, color="0.4")
            figure.tight_layout(rect=(0, 0.02, 1, 1))
            figure.savefig(folder / f"{name}.png", dpi=150)
            plt.close(figure)
            written.append(folder / f"{name}.png")
    return written


def _style(names) -> dict[str, dict]:
    """One colour and marker for each implementation; ours are filled, the others hollow."""
    markers = "osD^vP*X<>"
    order = sorted(names, key=lambda name: (not name.startswith("ours"), name))
    return {
        name: {
            "color": f"C{i % 10}",
            "marker": markers[i % len(markers)],
            "markerfacecolor": f"C{i % 10}" if name.startswith("ours") else "none",
            "linestyle": "none",
            "markersize": 6,
        }
        for i, name in enumerate(order)
    }


def _log_axis(axis, low: float, high: float) -> None:
    """A logarithmic axis with plain numbers in each decade within the limits."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [
        step * 10.0**d
        for d in decades
        for step in (1, 1.5, 2, 3, 5, 7)
        if low <= step * 10.0**d <= high
    ]
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def _roofline(plt, results: Results):
    """Left: FLOP/s over FLOP/byte of the products, below the device's two limits. Right: the share of
    the floor that the memory-bound ops reach."""
    rows = [row for row in results.rows if "fraction_of_floor" in row and _kind(row)]
    products = [row for row in rows if _kind(row) == "Linear" and row["row"] not in BASELINES]
    memory = [
        row for row in rows if _kind(row) in ("Merge", "Prune") and row["row"] not in BASELINES
    ]
    if not products and not memory:
        return None
    styles = _style({row["row"] for row in products + memory})
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, max(6, 2.5 + 0.17 * len({row["group"] for row in memory})))
    )
    rates = results.machine["rates"]
    for name, style in styles.items():
        mine = [row for row in products if row["row"] == name]
        if mine:
            left.plot(
                [row["flops"] / row["bytes"] for row in mine],
                [row["flops"] / row["median_s"] / 1e12 for row in mine], label=name, **style,
            )  # fmt: skip
    intensities = [row["flops"] / row["bytes"] for row in products] or [1.0, 100.0]
    ends = sorted(
        [
            min(intensities) / 2,
            rates["flop_per_s"] / rates["copy_bytes_per_s"],
            max(intensities) * 2,
        ]
    )
    left.plot(
        ends, [min(rates["flop_per_s"], i * rates["copy_bytes_per_s"]) / 1e12 for i in ends],
        color="0.2", label="floor: torch.mm and device copy",
    )  # fmt: skip
    speeds = [row["flops"] / row["median_s"] / 1e12 for row in products] or [1.0]
    _log_axis(left.xaxis, ends[0], ends[-1])
    _log_axis(left.yaxis, min(speeds) / 1.5, max([*speeds, rates["flop_per_s"] / 1e12]) * 1.3)
    left.set(xlabel="FLOP / byte", ylabel="TFLOP/s")
    left.set_title("lora_linear: FLOPs that the layer needs, per second")
    left.grid(True, which="both", alpha=0.2)
    left.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=3)
    labels = list(dict.fromkeys(row["group"] for row in memory))
    for row in memory:
        right.plot(
            row["fraction_of_floor"] * 100, labels.index(row["group"]), **styles[row["row"]],
            label=row["row"],
        )  # fmt: skip
    right.axvline(100, color="0.2")
    shares = [100 * row["fraction_of_floor"] for row in memory] or [100.0]
    _log_axis(right.xaxis, min(shares) / 1.3, max([*shares, 100.0]) * 1.3)
    right.set_yticks(range(len(labels)), labels, fontsize=7)
    right.invert_yaxis()
    right.set_xlabel("% of the floor (device copy rate)")
    right.set_title("merge and prune")
    right.grid(True, axis="x", which="both", alpha=0.2)
    handles = dict(zip(*reversed(right.get_legend_handles_labels())))
    if handles:
        right.legend(
            handles.values(), handles.keys(), fontsize=7, loc="upper center",
            bbox_to_anchor=(0.3, -0.09), ncols=3,
        )  # fmt: skip
    return figure


def _products_by_shape(results: Results) -> dict[str, dict[str, dict]]:
    """Forward + backward at the most measured "size" (tokens, r); "shapes": shape -> row name -> row."""
    rows = [
        row
        for row in results.rows
        if _kind(row) == "Linear" and row["problem"]["direction"] == "forward + backward"
    ]
    sizes = [(row["problem"]["tokens"], row["problem"]["r"]) for row in rows]
    if not sizes:
        return {}
    usual = max(sorted(set(sizes)), key=sizes.count)
    found: dict[str, dict[str, dict]] = {}
    for row, size in zip(rows, sizes):
        if size == usual:
            p = row["problem"]
            found.setdefault(f"{p['in_features']}\nto {p['out_features']}", {})[row["row"]] = row
    return {"size": usual, "shapes": found}


def _by_shape(plt, results: Results, value, title: str, label: str):
    found = _products_by_shape(results)
    if not found:
        return None
    shapes = {s: {n: v for n, r in m.items() if (v := value(r, m)) is not None}
              for s, m in found["shapes"].items()}  # fmt: skip
    names = {name for members in shapes.values() for name in members}
    if not names:
        return None
    figure, axes = plt.subplots(figsize=(max(7, 0.8 * len(shapes) + 3), 5.5))
    for name, style in _style(names).items():
        at = [i for i, members in enumerate(shapes.values()) if name in members]
        axes.plot(at, [list(shapes.values())[i][name] for i in at], label=name, **style)
    axes.set_xticks(range(len(shapes)), shapes, fontsize=7)
    axes.set_xlim(-0.5, len(shapes) - 0.5)
    tokens, r = found["size"]
    axes.set_title(f"{title}: forward + backward, {tokens:,} tokens, r = {r}")
    axes.set_ylabel(label)
    axes.grid(True, axis="y", alpha=0.3)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def _speedup(plt, results: Results):
    def value(row, members):
        return relative(members["eager LoRA"]) / relative(row) if "eager LoRA" in members else None

    figure = _by_shape(plt, results, value, "Speed", "times eager LoRA's speed")
    if figure is not None:
        figure.axes[0].axhline(1, color="0.2", linewidth=1)
    return figure


def _memory(plt, results: Results):
    steps = [r for r in results.rows if "tokens_per_s" in r and r.get("peak_bytes") is not None]
    if not steps:

        def value(row, members):
            return None if row.get("peak_bytes") is None else row["peak_bytes"] / 2**20

        return _by_shape(plt, results, value, "Memory on top of the operands", "MiB")
    labels = list(dict.fromkeys(row["group"].removeprefix("train step ") for row in steps))
    figure, axes = plt.subplots(figsize=(9, 0.45 * len(labels) + 2.5))
    for name, style in _style({row["row"] for row in steps}).items():
        mine = [row for row in steps if row["row"] == name]
        axes.plot(
            [row["peak_bytes"] / 2**30 for row in mine],
            [labels.index(row["group"].removeprefix("train step ")) for row in mine],
            label=name, **style,
        )  # fmt: skip
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("GiB")
    axes.set_title("Peak memory of a train step")
    axes.grid(True, axis="x", alpha=0.3)
    axes.legend(fontsize=8)
    return figure


# ---- README and command ---------------------------------------------------------------------------


def rewrite(readme: Path, files: list[Results]) -> None:
    """Put the figures between the marks. Raises ValueError for a CPU's figures or a page without marks."""
    for results in files:
        if not results.on_gpu:
            raise ValueError(
                f"expected a GPU's results for {readme.name}, got {results.machine['device']}'s"
            )
    text = readme.read_text(encoding="utf-8")
    if text.count(MARKS[0]) != 1 or text.count(MARKS[1]) != 1:
        raise ValueError(f"expected {MARKS[0]} and {MARKS[1]} in {readme}, once each")
    before, _, rest = text.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    later, parts = set(), []
    for results in reversed(files):
        rows = [row for row in results.rows if row["group"] not in later]
        later |= {row["group"] for row in rows}
        parts.insert(0, figures(dataclasses.replace(results, rows=rows)))
    text = f"{before}{MARKS[0]}\n{''.join(parts)}{MARKS[1]}{after}"
    readme.write_text(text, encoding="utf-8")


def figures(results: Results) -> str:
    """What the README shows of a file: where the figures come from, and our times beside the usual code's."""
    found = _products_by_shape(results)
    parts = [f"Measured on {results.source}.\n"]
    if found:
        tokens, r = found["size"]
        columns = ["eager LoRA", CHAINS[0], TWO_CALLS, FULL_RANK]
        parts.append(
            f"Time of the best backend of ours over that of each formula, forward + backward, {tokens:,} "
            f"tokens, r = {r}:\n\n| in, out | backend | ms | {' | '.join(columns)} |\n"
            f"|---|---|--:|{'--:|' * len(columns)}\n"
            + "".join(_shape_line(s, m, columns) for s, m in found["shapes"].items() if ours(m))
        )
    parts += [table for table in (_memory_table(results.rows), train_table(results.rows)) if table]
    return "\n" + "\n".join(parts) + "\n"


def _memory_table(rows: list[dict]) -> str:
    """Merges and prunes: our fastest backend, a copy of the tensors, and the usual code."""
    lines = [
        "| operation | backend | ms | copy of the tensors, ms | usual code | its ms | times faster |",
        "|---|---|--:|--:|---|--:|--:|",
    ]
    for group, members in groups(rows).items():
        problem = next(iter(members.values())).get("problem", {})
        if problem.get("kind") not in ("Merge", "Prune") or problem.get("by") or not ours(members):
            continue
        row = best(ours(members))
        usual = next((name for name in EAGER if name in members), None)
        if usual is None and len(problem.get("shapes", [])) == 1:
            continue  # other roundings of single weights: in the whole table
        cells = [group, row["row"].removeprefix("ours "), _ms(row["median_s"])]
        cells += [_ms(row["baseline_s"]), usual or "", "", ""]
        if usual is not None:
            cells[-2] = _ms(members[usual]["median_s"])
            cells[-1] = f"{relative(members[usual]) / relative(row):.1f}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def _shape_line(shape: str, members: dict, columns: list[str]) -> str:
    row = best(ours(members))
    cells = [
        f"{relative(row) / relative(members[name]):.2f}" if name in members else ""
        for name in columns
    ]
    in_, out = shape.split("\nto ")
    name = row["row"].removeprefix("ours ")
    return f"| {in_}, {out} | {name} | {1e3 * row['median_s']:.3f} | {' | '.join(cells)} |\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, help="folder for the plots; none are drawn without")
    parser.add_argument("--readme", type=Path, help="page whose figures to rewrite")
    args = parser.parse_args(arguments)
    try:
        files = [load(path) for path in args.results]
        for path, results in zip(args.results, files):
            with whole(path):
                tables = (
                    f"{results.source}\n\n{ratio_table(results.rows)}",
                    train_table(results.rows),
                    bars_table(bars(results)),
                )
                print(*tables, sep="\n")
        with whole(args.results[-1]):
            if args.output:
                for path in draw(files[-1], args.output):
                    print(path)
            if args.readme:
                rewrite(args.readme, files)
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
