"""One training step of the paper's models: full rank, eager LoRA as the ReLoRA authors compute it, ours.

"ours" uses `auto`, which follows the device's records. "ours triton" and the like name the backend of
the products, for the models that matter most.

A step is forward, backward and AdamW on one microbatch of random tokens, without dropout, in bf16 on a
GPU. Full rank and eager LoRA have everything in bf16 (as upstream does), ours has float32 factors with
bf16 weights (its default). "compiled" compiles each block of layers separately, as PyTorch advises for
repeated blocks: that takes seconds, where the whole model would take minutes.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

from relora_kernels import BackendUnavailable, ReLoRaConfig, apply_relora, measure, use_backend
from relora_kernels.model import relora_layers
from relora_kernels.ops.lora_linear import IMPLEMENTATIONS

METHODS = ("full-rank", "eager LoRA", "ours")
# Without dropout, triton_mask is the same as the reference.
NAMED = tuple(f"ours {name}" for name in IMPLEMENTATIONS if name != "triton_mask")
MODELS = ("350m", "1.3b", "60m", "250m")
EQUAL, LARGEST = "equal microbatch", "largest microbatch"
# Device memory that the largest microbatch may fill, in GiB.
GIB = float(os.environ.get("RELORA_BENCH_GIB", 24))


class EagerLora(nn.Module):
    """y = W x + s B (A x), with every tensor in W's dtype, left to PyTorch's autograd."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.scaling = layer.weight, layer.scaling
        dtype = layer.weight.dtype
        self.lora_A = nn.Parameter(layer.lora_A.detach().to(dtype))
        self.lora_B = nn.Parameter(layer.lora_B.detach().to(dtype))

    def forward(self, x):
        low_rank = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return F.linear(x, self.weight) + self.scaling * low_rank


class Step:
    """A model, its optimizer and a batch; calling it makes one step and returns the loss."""

    def __init__(self, preset: str, method: str, compiled: bool, microbatch: int, device):
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {k: int(v) for k, v in _preset(preset).items() if v.isdigit()}
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=sizes["vocab_size"],
            hidden_size=sizes["hidden_size"],
            intermediate_size=sizes["intermediate_size"],
            num_hidden_layers=sizes["num_layers"],
            num_attention_heads=sizes["num_heads"],
            max_position_embeddings=sizes["seq_length"],
            use_cache=False,
        )
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with torch.device(device):
            self.model = LlamaForCausalLM(config).to(dtype)
        shape = microbatch, sizes["seq_length"]
        self.tokens = torch.randint(sizes["vocab_size"], shape, device=device)
        plain = self._logits()
        if method != "full-rank":
            apply_relora(self.model, ReLoRaConfig(r=sizes["lora_r"], lora_alpha=32))
        if method == "eager LoRA":
            for path, layer in relora_layers(self.model):
                parent, _, name = path.rpartition(".")
                setattr(self.model.get_submodule(parent), name, EagerLora(layer))
        off = (self._logits() - plain).norm() / plain.norm()
        if not off <= 1e-2:  # with B = 0 it is the same model
            raise measure.Wrong(f"the logits differ by {off:.3g} from the plain model's")
        if compiled:
            for block in self.model.model.layers:
                block.compile(dynamic=False)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda")

    @torch.no_grad()
    def _logits(self) -> torch.Tensor:
        return self.model(input_ids=self.tokens[:1]).logits.float()

    def _loss(self) -> torch.Tensor:
        return self.model(input_ids=self.tokens, labels=self.tokens).loss

    def __call__(self) -> torch.Tensor:
        loss = self._loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def _preset(name: str) -> dict[str, str]:
    from relora_kernels.train.args import PRESETS

    return PRESETS[name]


def cases(gpu: bool) -> list[dict]:
    """All cases, most important first. A CPU gets a micro model at one size, not compiled."""
    if not gpu:
        return [_case("micro", method, False, EQUAL) for method in METHODS]
    return (
        [
            _case(preset, method, compiled, size)
            for size in (EQUAL, LARGEST)
            for preset in MODELS
            for compiled in (False, True)
            for method in METHODS
            if size == EQUAL or not compiled or preset in MODELS[:2]  # each size is recompiled
        ]
        + [_case(preset, method, False, EQUAL) for preset in MODELS[:2] for method in NAMED]
    )


def _case(preset: str, method: str, compiled: bool, size: str) -> dict:
    at = size if size == EQUAL else f"{size} in {GIB:g} GiB"
    group = f"train step {preset} {'compiled' if compiled else 'eager'}, {at}"
    return {
        "kind": "train", "name": f"{group} - {method}", "group": group, "row": method,
        "preset": preset, "compiled": compiled, "limit_s": 240.0, "gib": GIB if size == LARGEST else None,
    }  # fmt: skip


def why_not() -> str | None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        return f"the models are transformers' ({error}; pip install 'relora_kernels[train]')"
    return None


def in_turn(step) -> list[float]:
    """Seconds of each of a few steps, including the wait for the device."""
    seconds = []
    for _ in range(12 if step.tokens.is_cuda else 3):
        start = time.perf_counter()
        step()
        measure.synchronise(step.tokens.device)
        seconds.append(time.perf_counter() - start)
    return seconds


def run(case: dict, device: torch.device, timer=in_turn) -> dict:
    """Run one case: {status, tokens_per_s, peak_bytes, microbatch, median_s, ...}; timer(step) returns
    the seconds of a few steps."""
    record = {"group": case["group"], "row": case["row"], "gib": case["gib"]}
    if why_not() is not None:
        return {**record, "status": "unavailable", "reason": why_not()}
    gpu = device.type == "cuda"
    limit, share = None, 1.0
    if case["gib"] is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        limit, share = case["gib"] * 2**30, case["gib"] * 2**30 / total
        if share > 1:
            reason = f"this device has {total / 2**30:.0f} GiB"
            return {**record, "status": "unavailable", "reason": reason}
    if gpu:
        torch.cuda.set_per_process_memory_fraction(share, device)
    try:
        microbatch = int(_preset(case["preset"])["micro_batch_size"]) if gpu else 2
        if limit is not None:
            microbatch = largest(lambda n: trial(case, n, device, in_turn), limit)
        found = None if microbatch is None else trial(case, microbatch, device, timer)
    except BackendUnavailable as error:
        return {**record, "status": "unavailable", "reason": str(error)}
    finally:
        if gpu:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    if found is None:
        return {**record, "status": "unavailable", "reason": "out of memory"}
    return {**record, "status": "ok", **found}


def largest(attempt, limit_bytes: float) -> int | None:
    """The largest microbatch that fits, to within 5 %; None if not even one sequence does.

    Memory grows linearly with the microbatch, so two small ones predict the limit. If that does not fit
    (fragmentation, workspaces), it is tried again 5 % smaller.
    """
    one, two = attempt(1), attempt(2)
    if one is None or two is None:
        return None if one is None else 1
    each = max(two["peak_bytes"] - one["peak_bytes"], 1)
    n = int(1 + (limit_bytes - one["peak_bytes"]) / each)
    while n > 2 and attempt(n) is None:
        n = min(n - 1, math.floor(0.95 * n))
    return max(n, 2)


def trial(case: dict, microbatch: int, device: torch.device, timer) -> dict | None:
    """Tokens per second and peak memory of a few steps; None if they do not fit."""
    measure.release()
    try:
        with use_backend(
            case["row"].removeprefix("ours").strip() if case["row"] in NAMED else "auto"
        ):
            return _trial(case, microbatch, device, timer)
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _trial(case: dict, microbatch: int, device: torch.device, timer) -> dict:
    gpu = device.type == "cuda"
    step = Step(case["preset"], case["row"], case["compiled"], microbatch, device)
    for _ in range(4 if gpu else 1):  # compiles, and makes the optimizer's state
        step()
    measure.synchronise(device)
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    median, loss = statistics.median(timer(step)), step()
    if not math.isfinite(loss.item()):
        raise measure.Wrong(f"the loss is {loss.item()}")
    return {
        "microbatch": microbatch,
        "median_s": median,
        "tokens_per_s": step.tokens.numel() / median,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if gpu else None,
        "loss": loss.item(),
    }
