"""ReLoRA in a plain PyTorch loop: merge, reset and learning-rate restart hang on one schedule object.

    python examples/plain_loop.py                  trains a small model for 300 steps
    python examples/plain_loop.py --resume         continues from its last checkpoint

The model learns which of two numbers is the larger; the data is generated on the fly.
"""

import argparse
import os

import torch
from torch import nn

from relora_kernels import (
    ReLoRaConfig,
    ReLoRaSchedule,
    apply_relora,
    cosine_with_warmup,
    merge_and_unload,
)

NUMBERS, WIDTH, BATCH = 100, 64, 128


class Model(nn.Module):
    """Any nn.Module will do: apply_relora wraps its nn.Linear modules, here those named mlp."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(NUMBERS, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(2 * WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.head = nn.Linear(WIDTH, NUMBERS)

    def forward(self, ids):  # (batch, 2) -> (batch, NUMBERS)
        return self.head(self.mlp(self.embed(ids).flatten(1)))


def batch(step: int) -> torch.Tensor:
    """Data as a function of the step alone, so that a resumed run sees the same batches."""
    return torch.randint(NUMBERS, (BATCH, 2), generator=torch.Generator().manual_seed(step))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="length of the run, over 20")
    parser.add_argument("--stop-at", type=int, help="stop early, with a checkpoint")
    parser.add_argument("--restart-every", type=int, default=75, help="steps of a cycle")
    parser.add_argument("--checkpoint", default="plain_loop.pt", help="file to save to")
    parser.add_argument("--resume", action="store_true", help="continue from --checkpoint")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = apply_relora(Model(), ReLoRaConfig(r=8, lora_alpha=16, lora_dropout=0.1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    schedule = ReLoRaSchedule(
        model, optimizer, cosine_with_warmup(20, args.steps), args.restart_every,
        restart_warmup_steps=10, total_steps=args.steps,
    )  # fmt: skip
    first = 0
    if args.resume:
        saved = torch.load(args.checkpoint, weights_only=True)
        for name, part in (("model", model), ("optimizer", optimizer), ("schedule", schedule)):
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"])  # for the dropout masks
        first = saved["step"]

    last = args.steps if args.stop_at is None else args.stop_at
    for step in range(first, last):
        ids = batch(step)
        loss = nn.functional.cross_entropy(model(ids), ids.amax(1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        restarted = schedule.step()  # learning rate; if due: merge, new factors, pruned moments
        if restarted or (step + 1) % 25 == 0:
            rate = schedule.lr_scheduler.get_last_lr()[0]
            note = f"  restart {schedule.cycle}" if restarted else ""
            print(f"step {step + 1:4d}  loss {loss.item():.4f}  lr {rate:.2e}{note}", flush=True)

    states = {"model": model, "optimizer": optimizer, "schedule": schedule}
    states = {name: part.state_dict() for name, part in states.items()}
    torch.save({**states, "step": last, "rng": torch.get_rng_state()}, args.checkpoint + ".tmp")
    os.replace(args.checkpoint + ".tmp", args.checkpoint)  # never half a checkpoint
    if last == args.steps:
        merge_and_unload(model)  # plain nn.Linear modules again


if __name__ == "__main__":
    main()
