"""The model of a task, and one training step of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.e2e.providers import Provider
from benchmarks.e2e.shapes import CURVES, SHAPES
from benchmarks.providers import first_line
from benchmarks.timing import Timing

# Small enough that one batch is not learnt by heart in so few steps: losses near 0 compare nothing.
RATE = 1e-5
RANK = 16

Tell = Callable[..., None]


@dataclass(frozen=True)
class Task:
    """What one process does; everything that a provider must have in common with the others.

    Attributes:
        kind: "steps", "profile", "lengths" or "curve".
        shape: the name of one, or the path of a configuration.
        seconds: when the search for a length begins no further step.
        longest: where it ends in any case.
        text: a file of tokens, for a curve.
        vocab: the number of different tokens there.
        nudge: whether one weight is moved by one unit in its last place.
    """

    kind: str
    shape: str
    provider: str
    device: str
    batch: int
    seq: int
    dtype: str = "bfloat16"
    checkpointing: bool = False
    lora: bool = False
    steps: int = 10
    warm_up: int = 3
    seed: int = 0
    backend: str = "inductor"
    seconds: float = math.inf
    longest: int = 2**20
    text: str = ""
    vocab: int = 0
    nudge: bool = False


class Adapted(nn.Module):
    """A frozen linear layer and the low-rank product that is trained beside it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False, **like)
        self.up = nn.Linear(rank, base.out_features, bias=False, **like)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * self.up(self.down(x))


def add_adapters(model: Any, rank: int = RANK) -> None:
    """Freeze the model, and put adapters beside its linear layers, all but the head."""
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and layer is not head:
                setattr(parent, name, Adapted(layer, rank))


class Trainee:
    """A model that a provider has patched, its optimizer, and its training step."""

    def __init__(self, task: Task, provider: Provider, tell: Tell) -> None:
        self.task, self.provider = task, provider
        self.device = torch.device(task.device)
        tell(doing="model")
        self.model = make_model(task)
        tell(doing="patch", version=provider.version)
        start = time.perf_counter()
        replaced = provider.patch(self.model)
        tell(replaced=str(replaced or ""), patch_s=time.perf_counter() - start)
        if task.lora:
            torch.manual_seed(task.seed)
            add_adapters(self.model)
        if task.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        tell(parameters=sum(p.numel() for p in self.model.parameters()))

        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, RATE, fused=True)
        self.forward: Any = self.model
        if provider.compiled:
            self.forward = self._compiled(fullgraph=True)

    def _compiled(self, fullgraph: bool) -> Any:
        # A search for a length meets many of them; a compiler that may, makes that one program.
        dynamic = None if self.task.kind == "lengths" else False
        return torch.compile(
            self.model, fullgraph=fullgraph, dynamic=dynamic, backend=self.task.backend
        )

    def gradients(self, batch: Tensor) -> Tensor:
        """Forward and backward; return the loss, still on the device."""
        loss = self.forward(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, batch: Tensor) -> Tensor:
        loss = self.gradients(batch)
        self.update()
        return loss

    def first_gradients(self, batch: Tensor, tell: Tell) -> Tensor:
        """The first pass, which compiles; where there is no one graph, several."""
        if not self.provider.compiled:
            return self.gradients(batch)
        tell(doing="compile")
        try:
            loss = self.gradients(batch)
        except torch._dynamo.exc.TorchDynamoException as error:
            if is_out_of_memory(error):
                raise
            torch._dynamo.reset()
            self.optimizer.zero_grad(set_to_none=True)
            reason = first_line(error)
        else:
            tell(graph="one graph")
            return loss
        self.forward = self._compiled(fullgraph=False)
        loss = self.gradients(batch)
        tell(graph="several graphs", note=f"not one graph: {reason}")
        return loss

    def gradient_norm(self) -> float:
        norms = [
            torch.linalg.vector_norm(p.grad, dtype=torch.float32)
            for p in self.trained
            if p.grad is not None
        ]
        return torch.stack(norms).norm().item()

    def tokens(self, batch: int, seq: int) -> Tensor:
        """Random tokens, the same for every provider."""
        generator = torch.Generator().manual_seed(self.task.seed)
        vocab = self.model.config.get_text_config().vocab_size
        return torch.randint(vocab, (batch, seq), generator=generator).to(self.device)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def make_model(task: Task) -> Any:
    """Make the model with random weights, on its device, ready to train."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(task.seed)
    with torch.device(task.device):
        model = AutoModelForCausalLM.from_config(
            make_config(task), dtype=getattr(torch, task.dtype), attn_implementation="sdpa"
        )
    model.config.use_cache = False
    return model.train()


def make_config(task: Task) -> Any:
    """The configuration of a shape by its name, or of a file by its path."""
    import transformers

    if task.kind == "curve":
        shape = CURVES[task.shape]
        sizes = {"vocab_size": task.vocab, "max_position_embeddings": task.seq}
        sizes |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        return getattr(transformers, shape.config)(**shape.sizes | sizes)
    if task.shape not in SHAPES:
        from liger_fn.training.model import read_config

        return read_config(Path(task.shape))
    shape = SHAPES[task.shape]
    return getattr(transformers, shape.config)(**shape.sizes)


def measure_steps(task: Task, provider: Provider, tell: Tell) -> dict[str, Any]:
    """Train on one batch: times, memory, the loss at both ends, the gradient at the first."""
    trainee = Trainee(task, provider, tell)
    return measure_training(trainee, trainee.tokens(task.batch, task.seq), tell)


def measure_training(trainee: Trainee, batch: Tensor, tell: Tell) -> dict[str, Any]:
    """The same of a model that is there."""
    task = trainee.task
    tell(doing="first step")
    trainee.synchronize()
    start = time.perf_counter()
    losses = [trainee.first_gradients(batch, tell)]
    trainee.synchronize()
    first_s = time.perf_counter() - start
    tell(doing="steps", first_step_s=first_s, gradient_norm=trainee.gradient_norm())
    trainee.update()

    losses += [trainee.step(batch) for _ in range(task.warm_up)]
    trainee.synchronize()
    if trainee.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainee.device)
    laps = _Laps(trainee.device)
    for _ in range(task.steps):
        losses.append(trainee.step(batch))
        laps.lap()
    values = torch.stack(losses).tolist()
    return laps.facts(batch.numel()) | {
        "loss_first": values[0],
        "loss_last": values[-1],
        "steps": len(values),
        "peak_mib": peak_mib(trainee.device),
    }


class _Laps:
    """The times between steps, read once all of them are over: nothing waits in between."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []
        self.lap()

    def lap(self) -> None:
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def facts(self, tokens: int) -> dict[str, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            times = [a.elapsed_time(b) for a, b in pairwise(self.marks)]
        else:
            times = [(b - a) * 1e3 for a, b in pairwise(self.marks)]
        timing = Timing.of(times)
        return {
            "step_ms": timing.ms,
            "spread": timing.spread,
            "tokens_per_s": tokens / timing.ms * 1e3,
        }


def is_out_of_memory(error: BaseException) -> bool:
    # A compiler may wrap the error in one of its own.
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def peak_mib(device: torch.device) -> float | None:
    """The most memory since it was last asked to be watched; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
