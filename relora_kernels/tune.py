"""python -m relora_kernels tune: check and time every backend here, for `auto` to choose by.

Each backend of each op is checked against fp64 at the shapes of one model, then timed in turns with a
baseline; evidence.py reads what comes out. Every check and timing runs in another process with a time
limit, so a kernel that hangs or breaks the GPU's context costs its own row only.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from relora_kernels import evidence, measure, problems
from relora_kernels.worker import Worker

# Limits for checking and timing one row. The first one includes compilation: it applies when a backend
# serves an op for the first time.
FIRST_LIMIT_S, LIMIT_S = 75.0, 25.0
DIRECTIONS = ("forward", "backward")
ROUNDINGS = ("compensated", "nearest", "stochastic")
# model_type of transformers' models whose layers have these seven linears: q, k, v, o, gate, up, down.
LLAMA_LIKE = (
    "llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2",
    "olmo3", "smollm3", "granite", "cohere", "cohere2", "seed_oss", "exaone4", "hunyuan_v1_dense", "ernie4_5",
    "ministral3", "internlm3", "vaultgemma", "cwm", "stablelm", "bitnet", "diffllama",
)  # fmt: skip
# The workers must not inherit a backend that the user has named for other runs.
WORKER_ENVIRONMENT = {"RELORA_KERNELS_BACKEND": None}


def main(arguments: list[str]) -> int:
    """Exit status: 0 written, 1 nothing could be written, 2 cannot tune here, 130 interrupted (what was
    finished by then is written)."""
    args = _parser().parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "tune: expected a CUDA GPU that torch can use, got none; nothing was measured. On a machine "
            "without one `auto` takes the reference, and --device cpu tries out this command",
            file=sys.stderr,
        )
        return 2
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    try:
        linears = _linears(args)
    except (OSError, ValueError) as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    try:  # check before minutes of measuring, not after
        path = evidence.cache_path()
        evidence.check_writable(path)
    except OSError as error:
        return _cannot_write(error)
    cases = _cases(linears, args)
    here = evidence.identity(device)
    print(f"tune: {len(cases)} rows at {len(set(linears))} shapes on {evidence.section_name(here)}")
    records, interrupted = _measure(cases, args)
    entries = problems.entries(records)
    _print_table(records, entries)
    if not entries:
        print("tune: no shape was finished; nothing was written", file=sys.stderr)
        return 130 if interrupted else 1
    try:
        evidence.write(path, here, entries)
    except OSError as error:
        return _cannot_write(error)
    follows = "`auto` follows them" if device.type == "cuda" else "`auto` follows none on a CPU"
    print(f"tune: wrote {len(entries)} entries to {path}; {follows}")
    return 130 if interrupted else 0


def _cannot_write(error: OSError) -> int:
    print(
        f"tune: the cache could not be written: {error}; set {evidence.CACHE_VARIABLE} to a folder "
        f"that can",
        file=sys.stderr,
    )
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m relora_kernels tune", description=__doc__)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--preset", choices=problems.MODELS, default="350m", help="default: 350m")
    model.add_argument(
        "--model-config", type=Path, metavar="PATH", help="a Llama-like model's config.json"
    )
    model.add_argument(
        "--shapes", nargs="+", type=_shape, metavar="INxOUT", help="linears, e.g. 4096x11008"
    )
    parser.add_argument(
        "--tokens", nargs="+", type=_positive, default=[16384], metavar="M",
        help="tokens of one forward (sequences times length); default: 16384",
    )  # fmt: skip
    parser.add_argument("--r", type=_positive, default=128, help="rank; default: 128")
    parser.add_argument("--dropout", type=_share, default=0.0, help="lora_dropout; default: 0")
    parser.add_argument("--minutes", type=_minutes, default=2.5, help="at most; default: 2.5")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda",
        help="cpu tries the command out: `auto` never looks a CPU up",
    )  # fmt: skip
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return int(text)


def _share(text: str) -> float:
    return _number(text, lambda number: 0.0 <= number < 1.0, "in [0, 1)")


def _minutes(text: str) -> float:
    return _number(text, lambda number: 0.0 < number < math.inf, "> 0")


def _number(text: str, is_good: Callable[[float], bool], what: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not is_good(number):
        raise argparse.ArgumentTypeError(f"expected a number {what}, got {text!r}")
    return number


def _shape(text: str) -> tuple[int, int]:
    in_features, x, out_features = text.partition("x")
    if not x:
        raise argparse.ArgumentTypeError(f"expected INxOUT, e.g. 4096x11008, got {text!r}")
    return _positive(in_features), _positive(out_features)


def _linears(args) -> list[tuple[int, int]]:
    """(in, out) of every linear module of the model."""
    if args.shapes:
        return args.shapes
    if args.model_config is None:
        hidden, feed_forward, layers = problems.MODELS[args.preset]
        return problems.projections(hidden, feed_forward) * layers
    try:
        config = json.loads(args.model_config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected JSON in {args.model_config}, got {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"expected a model's settings in {args.model_config}, got {config!r:.60}")
    if config.get("model_type") not in (None, *LLAMA_LIKE):
        raise ValueError(
            f"expected {args.model_config} of a model with Llama's linears ({', '.join(LLAMA_LIKE)}), got "
            f"model_type {config['model_type']!r}; give --shapes instead"
        )
    try:
        hidden, feed_forward = config["hidden_size"], config["intermediate_size"]
        heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    except KeyError as error:
        raise ValueError(
            f"expected {args.model_config} to name hidden_size, intermediate_size, "
            f"num_attention_heads and num_hidden_layers, got no {error}; give --shapes instead"
        ) from error
    sizes = [hidden, feed_forward, heads, layers]
    sizes += [config.get(name) or 1 for name in ("head_dim", "num_key_value_heads")]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"expected the sizes in {args.model_config} to be >= 1, got {sizes}")
    if not config.get("head_dim") and hidden % heads:
        raise ValueError(
            f"expected hidden_size in {args.model_config} to be a multiple of num_attention_heads {heads}, "
            f"got {hidden}"
        )
    head = config.get("head_dim") or hidden // heads
    queries, keys = heads * head, (config.get("num_key_value_heads") or heads) * head
    layer = [
        (hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden),
        *[(hidden, feed_forward)] * 2, (feed_forward, hidden),
    ]  # fmt: skip
    return layer * layers


def _cases(linears: list[tuple[int, int]], args) -> list[dict]:
    """lora_linear first, because it runs at every step; largest shapes first."""
    dtype = "bfloat16" if args.device == "cuda" else "float32"
    shapes = sorted(set(linears), key=lambda shape: -shape[0] * shape[1])
    found = [
        problems.Linear(m, *shape, args.r, direction, dtype, "float32", args.dropout)
        for m in args.tokens
        for shape in shapes
        for direction in DIRECTIONS
    ]
    found += [
        problems.Merge((shape[::-1],), args.r, rounding)
        for shape in shapes
        for rounding in ROUNDINGS
    ]
    found.append(problems.Prune(problems.moments(linears, args.r), paired=True))
    return [
        {"problem": problem.to_dict(), "row": row, "device": args.device}
        for problem in found
        for row in problem.ours()
    ]


def run_case(case: dict) -> dict:
    """In the worker: check and time one of our rows."""
    problem, device = problems.from_dict(case["problem"]), case["device"]
    device = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    record = measure.run(problem, problem.ours()[case["row"]], device, seconds=0.1)
    return {**record, "row": case["row"]}


def _measure(cases: list[dict], args) -> tuple[list[dict], bool]:
    """(a record for each case, whether Ctrl-C interrupted it)."""
    from tqdm import tqdm

    deadline, records, compiled = time.monotonic() + 60 * args.minutes, [], set()
    interrupted = False
    with Worker("relora_kernels.tune:run_case", environment=WORKER_ENVIRONMENT) as worker:
        for case in tqdm(cases, unit="row", dynamic_ncols=True):
            left = deadline - time.monotonic()
            group = problems.from_dict(case["problem"]).name
            record = {"row": case["row"], "group": group, "status": "left out"}
            over = interrupted or not left > 0
            if not over:
                kernels = case["problem"]["kind"], case["row"]
                limit = LIMIT_S if kernels in compiled else FIRST_LIMIT_S
                compiled.add(kernels)
                try:
                    answer = worker.call(case, min(limit, left))
                except KeyboardInterrupt:
                    interrupted = over = True
                else:
                    over = answer["status"] == "hung" and left < limit  # no verdict on the row
                    if not over:
                        record |= answer.pop("value", {}) if answer["status"] == "ok" else answer
            if over:
                minutes = f"--minutes {args.minutes:g} were over"
                record["reason"] = "interrupted" if interrupted else minutes
            records.append(record)
    return records, interrupted


def _print_table(records: list[dict], entries: list[dict]) -> None:
    """Print times of the rows that passed, reasons for the others, and what `auto` then takes."""
    first = {(e["op"], *e["class"]): e["order"][0] for e in entries}
    group = None
    for record in records:
        if record["group"] != group:
            group = record["group"]
            print(f"\n{group}")
        name = record["row"].removeprefix("ours ")
        if record["status"] != "ok":
            print(f"  {name:12} {record['status']}: {record['reason']}")
            continue
        op, its_class = record["evidence"] or ("", [])
        taken = "  <- auto" if first.get((op, *its_class)) == name else ""
        print(
            f"  {name:12} {1e3 * record['median_s']:9.4f} ms, {record['fraction_of_floor']:.0%} of the "
            f"floor, error {record['error']:.2g}{taken}"
        )
    print()
