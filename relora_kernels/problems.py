"""What is measured: `Linear`, `Merge` and `Prune`, each an op at a shape.

A problem knows its minimum FLOPs and bytes and makes its operands. It offers a row for each of our backends
(`ours`) and the row that all are timed against (`baseline`), turns a row into functions to time (`steps`),
and checks a row against fp64 (`check`) by the same rule as the tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from relora_kernels import evidence
from relora_kernels.measure import Row, Wrong, errors
from relora_kernels.ops import lora_linear as linear_op
from relora_kernels.ops import merge as merge_op
from relora_kernels.ops import prune as prune_op
from relora_kernels.reference import lora_linear as linear_reference
from relora_kernels.reference import merge as merge_reference
from relora_kernels.reference import prune as prune_reference

# The paper's models: hidden and feed-forward size, layers. Each layer has q, k, v, o, gate, up and down.
MODELS = {
    "60m": (512, 1376, 8),
    "130m": (768, 2048, 12),
    "250m": (768, 2560, 24),
    "350m": (1024, 2736, 24),
    "1.3b": (2048, 5461, 24),
}
SCALING = 0.25
_TF32 = 2.0**-10  # relative error allowed in a merge: products of float32 factors may be tf32


def projections(hidden: int, feed_forward: int) -> list[tuple[int, int]]:
    """(in, out) of the seven linear modules of a Llama layer."""
    return [*[(hidden, hidden)] * 4, *[(hidden, feed_forward)] * 2, (feed_forward, hidden)]


def moments(linears: list[tuple[int, int]], r: int) -> tuple[int, ...]:
    """Sizes of A and B of each (in, out): the tensors that an optimizer reset prunes."""
    return tuple(size * r for in_and_out in linears for size in in_and_out)


class Problem:
    def to_dict(self) -> dict:
        """A dict for JSON; `from_dict` reads it."""
        return {"kind": type(self).__name__, **dataclasses.asdict(self)}

    def same_operands(self):
        """The problem whose operands this one can use."""
        return self

    def steps(self, row: Row, all_operands: list) -> list[Callable]:
        """The functions to time, one for each set of operands."""
        return [_under(row, row.make(o)) for o in all_operands]


def _under(row: Row, function: Callable) -> Callable:
    def step():
        with row.in_force(), torch.no_grad():
            return function()

    return step


# ---- lora_linear ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Linear(Problem):
    """y = x W^T + s (x A^T) B^T of x (tokens, in), W (out, in), A (r, in), B (out, r), and its gradients.

    `direction`: "forward" (including what autograd keeps), "backward" (dx, dA, dB), or both. Or "main loop":
    the fused kernel without its low-rank part, for backends whose module has main_loop(x, W) -> x W^T, and
    for each value of a backend's CLUSTER. Or "backward by PAIR": for each value of a backend's PAIR (cuda: Q
    and dB in one launch, or in two).
    """

    tokens: int
    in_features: int
    out_features: int
    r: int
    direction: str = "forward + backward"
    dtype: str = "bfloat16"
    factors: str = "bfloat16"
    dropout: float = 0.0

    BASELINE = "frozen linear"

    @property
    def name(self) -> str:
        return (
            f"linear {self.direction} {self.tokens} tokens, {self.in_features} to "
            f"{self.out_features}, r {self.r}, {self.dtype}"
            + (f", dropout {self.dropout}" if self.dropout else "")
        )

    @property
    def flops(self) -> int:
        """2 M (N K + r (N + K)) forward, 2 M (N K + 2 r (N + K)) backward. No dW, because W is frozen."""
        base = 2 * self.tokens * self.in_features * self.out_features
        low_rank = 2 * self.tokens * self.r * (self.in_features + self.out_features)
        return {
            "main loop": base,
            "forward": base + low_rank,
            "backward": base + 2 * low_rank,
            "backward by PAIR": base + 2 * low_rank,
        }.get(self.direction, 2 * base + 3 * low_rank)

    @property
    def bytes(self) -> int:
        """Each operand once per pass: x, y, P, W, A, B forward; dy, x, P, W, A, B, dx, dA, dB backward."""
        size = getattr(torch, self.dtype).itemsize
        ends = self.tokens * (self.in_features + self.out_features)
        weight = self.in_features * self.out_features
        factors = self.r * (self.in_features + self.out_features)
        p, x = self.tokens * self.r, self.tokens * self.in_features
        forward = ends + weight + factors + p
        backward = ends + x + p + weight + 2 * factors
        return size * {
            "main loop": ends + weight,
            "forward": forward,
            "backward": backward,
            "backward by PAIR": backward,
        }.get(self.direction, forward + backward)

    @property
    def resident_bytes(self) -> int:
        """Bytes of what every direction reads: x (or dy) and W."""
        size, ends = getattr(torch, self.dtype).itemsize, min(self.in_features, self.out_features)
        return size * (self.tokens * ends + self.in_features * self.out_features)

    def ours(self) -> dict[str, Row]:
        """A row for each backend of the op."""
        if self.direction == "main loop":
            modules = linear_op.IMPLEMENTATIONS.items()
            rows = {f"ours {n}": _our_main_loop(n) for n, m in modules if hasattr(m, "main_loop")}
            return rows | _by_constant("CLUSTER", _our_main_loop)
        if self.direction == "backward by PAIR":
            return _by_constant("PAIR", _our_linear)
        return {f"ours {name}": _our_linear(name) for name in linear_op.IMPLEMENTATIONS}

    def baseline(self) -> Row:
        return Row(lambda o: lambda: F.linear(o.x, o.weight), computes="frozen")

    def prepare(self, device: torch.device) -> LinearOperands:
        return LinearOperands(self, device)

    def same_operands(self) -> Linear:
        return dataclasses.replace(self, direction="forward")

    def steps(self, row: Row, all_operands: list) -> list[Callable]:
        return [self._step(row, operands) for operands in all_operands]

    def _step(self, row: Row, o: LinearOperands) -> Callable:
        forward, leaves = row.make(o), o.leaves(row.computes)

        def both():
            with row.in_force():
                return torch.autograd.grad(forward(), leaves, o.dy)

        def only_forward():
            with row.in_force():
                return forward()

        if self.direction in ("forward", "main loop"):
            return only_forward
        if not self.direction.startswith("backward"):
            return both
        y = only_forward()

        def only_backward():
            with row.in_force():
                return torch.autograd.grad(y, leaves, o.dy, retain_graph=True)

        return only_backward

    def check(self, row: Row, o: LinearOperands) -> dict:
        """The error against fp64 is at most 2 times (forward) or 3 times (gradients) that of the eager
        formula in the working dtype (FlashAttention's rule)."""
        exact, eager_errors = o.oracle(row.computes)
        names = ["y", *o.leaf_names(row.computes)]
        forward, leaves = row.make(o), o.leaves(row.computes)

        def once():
            with row.in_force():
                y = forward()
                gradients = torch.autograd.grad(y, leaves, o.dy) if y.requires_grad else []
                return [y.detach(), *gradients]

        got, again = once(), once()
        ratios, relative = [0.0], []
        for name, ours, oracle, eager in zip(names, got, exact, eager_errors):
            error, relative_error = errors(name, ours, oracle)
            few = torch.finfo(o.x.dtype).eps * oracle.abs().max().item() * (oracle.numel() < 1024)
            if error > (2 if name == "y" else 3) * eager + few:
                raise Wrong(f"{name} is off by {error:.3g}, the eager formula by {eager:.3g}")
            ratios.append(error / eager if eager > 0 else 0.0)
            relative.append(relative_error)
        return {
            "error": max(relative),
            "error_over_eager": max(ratios),
            "repeatable": all(torch.equal(a, b) for a, b in zip(got, again)),
        }

    def evidence_class(self, o: LinearOperands) -> tuple[str, list] | None:
        op = {"forward": "lora_linear", "backward": "lora_linear backward"}.get(self.direction)
        if op is None:
            return None
        return op, list(evidence.CLASSES["lora_linear"](*o.call()))


class LinearOperands:
    def __init__(self, problem: Linear, device: torch.device):
        dtype, factors = getattr(torch, problem.dtype), getattr(torch, problem.factors)
        M, K, N, r = problem.tokens, problem.in_features, problem.out_features, problem.r

        def leaf(*shape, scale=1.0, dtype=dtype):
            t = (torch.randn(shape, device=device) * scale).to(dtype)
            return torch.nn.Parameter(t)

        self.problem = problem
        self.x, self.dy = leaf(M, K), leaf(M, N).detach()
        self.weight = leaf(N, K, scale=K**-0.5).requires_grad_(False)
        # For full rank; shares weight's memory.
        self.trained_weight = torch.nn.Parameter(self.weight.detach())
        self.lora_A = leaf(r, K, scale=K**-0.5, dtype=factors)
        self.lora_B = leaf(N, r, scale=0.1, dtype=factors)
        self.scaling, self.dropout = SCALING, problem.dropout
        self.seed = torch.tensor(1, device=device) if self.dropout else None
        self._oracles = {}

    def call(self) -> tuple:
        """The arguments of the op's forward."""
        return (
            self.x.detach(), self.weight, self.lora_A.detach(), self.lora_B.detach(), self.scaling,
            None, self.dropout, self.seed,
        )  # fmt: skip

    def leaf_names(self, computes: str) -> list[str]:
        return {"lora": ["x", "lora_A", "lora_B"], "frozen": ["x"]}.get(
            computes, ["x", "trained_weight"]
        )

    def leaves(self, computes: str) -> list[torch.Tensor]:
        return [getattr(self, name) for name in self.leaf_names(computes)]

    def oracle(self, computes: str):
        """(y and gradients in fp64, the eager formula's errors against them), computed once."""
        if computes not in self._oracles:
            names = self.leaf_names(computes)
            exact = self._eager(names, torch.float64)
            usual = self._eager(names, self.x.dtype)
            pairs = zip(["y", *names], usual, exact)
            self._oracles[computes] = exact, [errors(*triple)[0] for triple in pairs]
        return self._oracles[computes]

    def _eager(self, names: list[str], dtype: torch.dtype) -> list[torch.Tensor]:
        """The formula in plain PyTorch, from A and B rounded to x's dtype."""
        narrow = self.x.dtype
        t = {
            name: getattr(self, name).detach().to(narrow).to(dtype).requires_grad_(name in names)
            for name in ("x", "weight", "lora_A", "lora_B", "trained_weight")
        }
        x, weight = t["x"], t["trained_weight" if "trained_weight" in names else "weight"]
        y = F.linear(x, weight)
        if "lora_A" in names:
            if self.dropout:
                x = x * linear_reference.dropout_mask(x.detach(), self.dropout, self.seed)
            y = y + self.scaling * F.linear(F.linear(x, t["lora_A"]), t["lora_B"])
        return [y.detach(), *torch.autograd.grad(y, [t[n] for n in names], self.dy.to(dtype))]


def _our_linear(name: str) -> Row:
    def make(o):
        args = (o.x, o.weight, o.lora_A, o.lora_B, o.scaling, None, o.dropout, o.seed)
        return lambda: linear_op.lora_linear(*args)

    def why_not(o):
        module, args = linear_op.IMPLEMENTATIONS[name], o.call()
        x, weight, lora_A, lora_B = args[:4]
        p = x.new_empty(len(x), len(lora_A))
        return module.why_not_forward(*args) or module.why_not_backward(
            o.dy,
            x,
            weight,
            lora_A,
            lora_B,
            p,
            o.scaling,
            o.dropout,
            o.seed,
            True,
            True,
            True,
            False,
        )

    return Row(make, name, why_not=why_not)


def _by_constant(constant: str, make: Callable, op=linear_op) -> dict[str, Row]:
    """A row for each value of a module's constant, such as PAIR, that the module lists as PAIRS."""
    return {
        f"ours {name}, {constant} = {value}": dataclasses.replace(
            make(name), setting=functools.partial(_constant, module, constant, value)
        )
        for name, module in op.IMPLEMENTATIONS.items()
        for value in getattr(module, f"{constant}S", ())
    }


@contextlib.contextmanager
def _constant(module, name: str, value):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _our_main_loop(name: str) -> Row:
    module = linear_op.IMPLEMENTATIONS[name]
    return Row(
        lambda o: lambda: module.main_loop(o.x.detach(), o.weight),
        name,
        "frozen",
        lambda o: module.why_not_forward(*o.call()),
    )


# ---- merge_ ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Merge(Problem):
    """W += s B A in place, W (out, in), for each of `shapes`. `factors`: the dtype of A and B.

    `by`: the name of a constant, such as KERNEL: a backend gets a row for each of its values (KERNELS).
    """

    shapes: tuple[tuple[int, int], ...]
    r: int
    rounding: str = "nearest"
    dtype: str = "bfloat16"
    factors: str = "float32"
    by: str = ""

    BASELINE = "device copy"

    @property
    def name(self) -> str:
        what = " to ".join(map(str, reversed(self.shapes[0])))
        if len(self.shapes) > 1:
            what = f"{len(self.shapes)} weights of {self.elements:,} elements"
        factors = "" if self.factors == "float32" else f", {self.factors} factors"
        by = f", by {self.by}" if self.by else ""
        return f"merge {self.rounding} {what}, r {self.r}, {self.dtype}{factors}{by}"

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def flops(self) -> int:
        return 2 * self.r * self.elements

    @property
    def bytes(self) -> int:
        """W, and the residual if there is one, read and written once; A and B read once."""
        size = getattr(torch, self.dtype).itemsize * (2 if self.rounding == "compensated" else 1)
        factors = self.r * sum(map(sum, self.shapes))
        return 2 * size * self.elements + getattr(torch, self.factors).itemsize * factors

    @property
    def resident_bytes(self) -> int:
        return self.elements * getattr(torch, self.dtype).itemsize

    def ours(self) -> dict[str, Row]:
        if self.by:
            return _by_constant(self.by, _our_merge, merge_op)
        return {f"ours {name}": _our_merge(name) for name in merge_op.IMPLEMENTATIONS}

    def baseline(self) -> Row:
        def make(o):
            spares = [torch.empty_like(w) for w in o.weights]
            return lambda: torch._foreach_copy_(spares, o.weights)

        return Row(make, computes="copy")

    def prepare(self, device: torch.device) -> MergeOperands:
        return MergeOperands(self, device)

    def check(self, row: Row, o: MergeOperands) -> dict:
        """The error of W (compensated: of W + residual) against fp64 is at most twice the reference's, plus
        what tf32 products may add."""
        if row.computes == "copy":
            return {}
        before = [t.clone() for t in (*o.weights, *o.residuals)]
        o.sign = 1
        _under(row, row.make(o))()
        worst, relative = 0.0, 0.0
        for i, (weight, lora_A, lora_B) in enumerate(zip(o.weights, o.lora_A, o.lora_B)):
            reference, kept = before[i].clone(), None
            if o.residuals:
                kept = before[len(o.weights) + i].clone()
            update = SCALING * (lora_B.double() @ lora_A.double())
            exact = before[i].double() + update
            if kept is not None:
                exact += kept.double()
            merge_reference.merge_(
                reference, lora_A, lora_B, SCALING, self.rounding, kept, o.seeds[i], 0
            )
            ours, reference = weight.double(), reference.double()
            if kept is not None:
                ours, reference = ours + o.residuals[i].double(), reference + kept.double()
            limit = 2 * errors("W", reference, exact)[0] + _TF32 * update.abs().max().item()
            error, relative_error = errors("W", ours, exact)
            if error > limit:
                raise Wrong(f"W {i} is off by {error:.3g}, more than {limit:.3g}")
            worst, relative = max(worst, error / limit), max(relative, relative_error)
        return {"error": relative, "error_over_eager": 2 * worst}

    def evidence_class(self, o: MergeOperands) -> tuple[str, list] | None:
        if len(self.shapes) > 1 or self.by:
            return None  # evidence is kept for one layer and the default constant
        call = o.weights[0], o.lora_A[0], o.lora_B[0], SCALING, self.rounding
        return "merge_", list(evidence.CLASSES["merge_"](*call))


class MergeOperands:
    """The update is as large as W itself, so that a missing one shows. Its sign alternates, so that W does
    not grow however often it is merged."""

    def __init__(self, problem: Merge, device: torch.device):
        dtype, factors = getattr(torch, problem.dtype), getattr(torch, problem.factors)

        def random(*shape, scale=1.0, dtype=dtype):
            return (torch.randn(shape, device=device) * scale).to(dtype)

        self.weights = [random(*shape) for shape in problem.shapes]
        narrow_residual = problem.rounding == "compensated" and dtype.itemsize == 2
        self.residuals = [random(*s, scale=1e-3) for s in problem.shapes if narrow_residual]
        self.lora_A = [random(problem.r, n, dtype=factors) for _, n in problem.shapes]
        self.lora_B = [
            random(m, problem.r, scale=problem.r**-0.5, dtype=factors) for m, _ in problem.shapes
        ]
        self.seeds = list(range(1, len(problem.shapes) + 1))
        self.rounding, self.sign = problem.rounding, 1

    def calls(self):
        """The arguments of each merge. The sign flips after each pass over the list."""
        residuals = self.residuals or [None] * len(self.weights)
        for weight, lora_A, lora_B, residual, seed in zip(
            self.weights, self.lora_A, self.lora_B, residuals, self.seeds
        ):
            yield weight, lora_A, lora_B, SCALING * self.sign, self.rounding, residual, seed
        self.sign = -self.sign


def _our_merge(name: str) -> Row:
    def make(o):
        module = merge_op.IMPLEMENTATIONS[name]

        def merge():
            for call in o.calls():
                merge_op.merge_checked(*call)

        def merge_list():  # as merge_and_reinit merges a model
            module.merge_many_([(*call, 0) for call in o.calls()])

        return merge_list if len(o.weights) > 1 else merge

    def why_not(o):
        call = o.weights[0], o.lora_A[0], o.lora_B[0], SCALING, o.rounding
        residual = o.residuals[0] if o.residuals else None
        return merge_op.IMPLEMENTATIONS[name].why_not(*call, residual, 0, 0)

    return Row(make, name, why_not=why_not)


# ---- prune_ ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prune(Problem):
    """Zero the smallest share `ratio` of a tensor of each size; if `paired`, mask a partner alike."""

    sizes: tuple[int, ...]
    paired: bool = False
    dtype: str = "float32"
    ratio: float = 0.9

    BASELINE = "device copy"

    @property
    def name(self) -> str:
        tensors = f"{len(self.sizes)} tensors, " if len(self.sizes) > 1 else ""
        paired = ", paired" if self.paired else ""
        ratio = f", ratio {self.ratio}" if self.ratio != Prune.ratio else ""
        return f"prune {tensors}{sum(self.sizes):,} elements{paired}, {self.dtype}{ratio}"

    @property
    def flops(self) -> int:
        return 0

    @property
    def bytes(self) -> int:
        """Two reads and one write per element, one read and one write per element of a partner."""
        per_element = 5 if self.paired else 3
        return per_element * sum(self.sizes) * getattr(torch, self.dtype).itemsize

    @property
    def resident_bytes(self) -> int:
        return sum(self.sizes) * getattr(torch, self.dtype).itemsize

    def ours(self) -> dict[str, Row]:
        return {f"ours {name}": _our_prune(name) for name in prune_op.IMPLEMENTATIONS}

    def baseline(self) -> Row:
        def make(o):
            spares = [torch.empty_like(t) for t in o.tensors]
            return lambda: torch._foreach_copy_(spares, o.tensors)

        return Row(make, computes="copy")

    def prepare(self, device: torch.device) -> PruneOperands:
        return PruneOperands(self, device)

    def check(self, row: Row, o: PruneOperands) -> dict:
        """The result equals the reference's bit for bit; `computes="about"`: up to two elements may differ."""
        if row.computes == "copy":
            return {}
        o.restore()
        expected = [t.clone() for t in (*o.tensors, *o.partners)]
        many = len(o.tensors)
        prune_reference.prune_(expected[:many], self.ratio, expected[many:])
        _under(row, row.make(o))()
        differing = 0
        for i, (got, right) in enumerate(zip((*o.tensors, *o.partners), expected)):
            wrong = int((got != right).sum())
            differing += wrong
            if wrong > (2 if row.computes == "about" else 0):
                raise Wrong(f"tensor {i}: {wrong} of {got.numel()} elements differ")
        return {"error": differing / sum(self.sizes), "error_over_eager": float(differing > 0)}

    def evidence_class(self, o: PruneOperands) -> tuple[str, list] | None:
        if self.ratio != Prune.ratio:
            return None  # a class does not contain the ratio
        return "prune_", list(evidence.CLASSES["prune_"](o.tensors, self.ratio, o.partners))


class PruneOperands:
    """`restore` brings back fresh tensors before each call, because pruned ones are mostly ties at zero.

    Partners are drawn independently, so that a kernel that masks them by their own magnitudes shows.
    """

    def __init__(self, problem: Prune, device: torch.device):
        dtype = getattr(torch, problem.dtype)
        self.ratio = problem.ratio
        lists = 2 if problem.paired else 1
        self.fresh = [
            torch.randn(n, device=device).to(dtype) for _ in range(lists) for n in problem.sizes
        ]
        copies = [t.clone() for t in self.fresh]
        self.tensors, self.partners = copies[: len(problem.sizes)], copies[len(problem.sizes) :]

    def restore(self) -> None:
        torch._foreach_copy_([*self.tensors, *self.partners], self.fresh)


def _our_prune(name: str) -> Row:
    def make(o):
        partners = o.partners or None
        return lambda: prune_op.prune_(o.tensors, o.ratio, partners)

    def why_not(o):
        return prune_op.IMPLEMENTATIONS[name].why_not(o.tensors, o.ratio, o.partners)

    return Row(make, name, why_not=why_not)


# ---- Records --------------------------------------------------------------------------------------


def from_dict(fields: dict):
    """The problem that `to_dict` wrote."""
    fields = dict(fields)
    kind = {"Linear": Linear, "Merge": Merge, "Prune": Prune}[fields.pop("kind")]
    for name in ("shapes", "sizes"):
        if name in fields:
            fields[name] = tuple(tuple(v) if isinstance(v, list) else v for v in fields[name])
    return kind(**fields)


def entries(records: list[dict]) -> list[dict]:
    """Evidence for `auto`, from what `measure.run` found about our rows ("row": "ours NAME").

    There is one entry for each class in which the reference passed, from the problems of which no row was
    left out. `order` holds the rows that passed, sorted by time relative to the baseline, which was measured
    alternately with each. A row that was wrong or failed at any size of the class is excluded.
    """
    unfinished = {record["group"] for record in records if record["status"] == "left out"}
    passed = [record for record in records if record["status"] == "ok" and record["evidence"]]
    class_of = {record["group"]: str(record["evidence"]) for record in passed}
    bad = {
        (class_of.get(record["group"]), record["row"])
        for record in records
        if record["status"] not in ("ok", "unavailable", "left out")
    }
    classes: dict[tuple, dict] = {}
    for record in passed:
        good = (str(record["evidence"]), record["row"]) not in bad
        if record["row"].startswith("ours ") and good and record["group"] not in unfinished:
            op, its_class = record["evidence"]
            row = {k: record[k] for k in ("median_s", "baseline_s", "error", "error_over_eager")}
            classes.setdefault((op, *its_class), {})[record["row"].removeprefix("ours ")] = row
    return [
        {
            "op": op,
            "class": its_class,
            "order": sorted(rows, key=lambda n: rows[n]["median_s"] / rows[n]["baseline_s"]),
            "rows": rows,
        }
        for (op, *its_class), rows in classes.items()
        if "reference" in rows
    ]
