"""One training run: AdamW, warm-up and cosine, losses and times."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn
from tqdm.auto import tqdm

from liger_fn.training.text import first_batches, random_batches

HELD_OUT_BATCHES = 8
# How often losses are fetched: often enough for the eye, seldom enough that a GPU is not held up.
LOOKS = 50


@dataclass(frozen=True)
class Settings:
    """How to train; the same for every run of a comparison."""

    steps: int
    batch: int
    seq: int
    lr: float
    seed: int
    device: torch.device
    dtype: str
    compile: bool = False

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    def autocast(self) -> contextlib.AbstractContextManager:
        on = self.dtype == "mixed"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on)


@dataclass
class Run:
    """What one run showed."""

    provider: str
    of: str = ""
    losses: list[float] = field(default_factory=list)
    tokens_per_second: float = math.nan
    peak_mib: float | None = None
    held_out: tuple[float, float] = (math.nan, math.nan)


def train(
    run: Run,
    model: nn.Module,
    tokens: torch.Tensor,
    held_out: torch.Tensor,
    settings: Settings,
) -> None:
    """Train `model` in place; note its losses, its speed and its peak memory in `run`."""
    forward = cast(nn.Module, torch.compile(model)) if settings.compile else model
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.lr, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: rate(i, settings.steps))
    batches = random_batches(tokens, settings.batch, settings.seq, settings.seed)

    before = evaluate(model, held_out, settings)
    torch.manual_seed(settings.seed)
    watch_memory(settings.device)
    speeds = []
    with tqdm(total=settings.steps, desc=f"{run.provider:<9}", unit="step", mininterval=0.5) as bar:
        for count in looks(settings.steps):
            start = time.perf_counter()
            losses = []
            for _ in range(count):
                losses.append(step(forward, next(batches), optimizer, schedule, settings))
                bar.update()
            # The one wait for the device.
            run.losses += torch.stack(losses).tolist()
            speeds.append(count * settings.batch * settings.seq / (time.perf_counter() - start))
            bar.set_postfix_str(
                f"loss {run.losses[-1]:.3f}, {speeds[-1]:,.0f} tokens/s", refresh=False
            )

    run.peak_mib = peak_mib(settings.device)
    # The first tenth compiles, tunes and fills caches; it is no part of the speed.
    run.tokens_per_second = statistics.median(speeds[len(speeds) // 10 :])
    run.held_out = (before, evaluate(model, held_out, settings))


def step(
    model: nn.Module,
    batch: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    settings: Settings,
) -> torch.Tensor:
    """Take one optimizer step and return the loss before it, still on the device."""
    batch = batch.to(settings.device)
    with settings.autocast():
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return loss.detach()


def rate(i: int, steps: int) -> float:
    """Give the learning rate at step i, as a share of its peak: warm-up, then cosine to a tenth."""
    warm = max(1, steps // 5)
    if i < warm:
        return (i + 1) / warm
    done = (i - warm) / max(1, steps - warm)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def looks(steps: int) -> Iterator[int]:
    """Cut the steps into about LOOKS equal pieces."""
    size = math.ceil(steps / LOOKS)
    for done in range(0, steps, size):
        yield min(size, steps - done)


@torch.no_grad()
def evaluate(model: nn.Module, held_out: torch.Tensor, settings: Settings) -> float:
    """Give the mean loss over the first windows of the text that is held out."""
    model.eval()
    total, windows = 0.0, 0
    for batch in first_batches(held_out, settings.batch, settings.seq, HELD_OUT_BATCHES):
        batch = batch.to(settings.device)
        with settings.autocast():
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        total += loss.item() * len(batch)
        windows += len(batch)
    model.train()
    return total / windows


def watch_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_mib(device: torch.device) -> float | None:
    """Give the peak of allocated device memory; None on a CPU: a process's peak never falls."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
