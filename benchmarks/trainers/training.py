"""One training run: everything is made here from a seed, nothing is downloaded."""

import tempfile
import time
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback

from benchmarks.e2e.trainee import Tell, peak_mib
from benchmarks.timing import Timing
from benchmarks.trainers.providers import Provider
from benchmarks.trainers.sizes import SIZES, Size, Task, options, tokens_a_step

# The first words are not drawn: they pad, end, and begin.
SPECIAL = 3
RATE = 1e-5


class Watch(TrainerCallback):
    """Times every step, generation included, and the memory of those after the warm-up."""

    def __init__(self, device: torch.device, warm_up: int, tell: Tell) -> None:
        self.device, self.warm_up, self.tell = device, warm_up, tell
        self.times: list[float] = []
        self.start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.warm_up and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.tell(doing=f"step {state.global_step + 1}")
        self.start = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.times.append((self._now() - self.start) * 1e3)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def measure(task: Task, provider: Provider, tell: Tell) -> dict[str, Any]:
    """Train for some steps: their times, memory, and every loss that the trainer logs."""
    device, size = torch.device(task.device), SIZES[task.size]
    tell(doing="trainer", version=provider.version())
    trainer = make_trainer(task, provider, size)
    reports = getattr(trainer, "reports", ())
    tell(
        parameters=sum(p.numel() for p in trainer.model.parameters()),
        replaced=", ".join(f"{op} {n}" for r in reports[:1] for op, n in r.replaced().items()),
    )
    watch = Watch(device, task.warm_up, tell)
    trainer.add_callback(watch)
    trainer.train()

    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    timing = Timing.of(watch.times[task.warm_up :])
    return {
        "step_ms": timing.ms,
        "spread": timing.spread,
        "slowest_ms": max(watch.times[task.warm_up :]),
        "tokens_per_s": tokens_a_step(task.trainer, size) / timing.ms * 1e3,
        "peak_mib": peak_mib(device),
        "losses": [entry["loss"] for entry in logged],
        "entropies": [entry.get("entropy") for entry in logged],
        "gradient_norm": logged[0]["grad_norm"],
    }


def make_trainer(task: Task, provider: Provider, size: Size) -> Any:
    import trl
    from datasets import Dataset

    count = (task.warm_up + task.steps) * size.batch[task.trainer]
    trainer, on_cpu = task.trainer, task.device == "cpu"
    arguments = getattr(trl, f"{trainer}Config")(
        output_dir=tempfile.mkdtemp(),
        max_steps=task.warm_up + task.steps,
        learning_rate=RATE,
        seed=task.seed,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=on_cpu,
        bf16=not on_cpu,
        **options(trainer, size),
        **provider.options,
    )
    # Of several GPUs Trainer would make nn.DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    more: dict[str, Any] = {}
    if trainer == "DPO":
        more["ref_model"] = make_model(task, size)
    if trainer == "GRPO":
        more["reward_funcs"] = share_of_even
    model = make_model(task, size)
    if provider.nudge:
        nudge(model, task.seed)
    return provider.trainer(trainer)(
        model,
        args=arguments,
        train_dataset=Dataset.from_list(texts(trainer, size, count, task.seed)),
        processing_class=tokenizer(size.model["vocab_size"]),
        **more,
    )


@torch.no_grad()
def nudge(model: Any, seed: int) -> None:
    """Move every weight by half a unit of bfloat16's last place at most, as rounding moves it."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        share = torch.rand(p.shape, generator=generator).to(p.device) - 0.5
        p.mul_(1 + share * torch.finfo(torch.bfloat16).eps)


def make_model(task: Task, size: Size) -> Any:
    """Make the model with random weights in float32, as TRL loads it by default."""
    torch.manual_seed(task.seed)
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = Qwen3Config(**size.model, **special, tie_word_embeddings=True)
    with torch.device(task.device):
        return Qwen3ForCausalLM(config).train()


def tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer for which w17 is a word, and the number of its token 17."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(vocab)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="w0", unk_token="w0", eos_token="w1", bos_token="w2",
        padding_side="left",
    )  # fmt: skip


def texts(trainer: str, size: Size, count: int, seed: int) -> list[dict[str, str]]:
    """Draw rows of words, in the columns that a trainer asks for."""
    generator = torch.Generator().manual_seed(seed)

    def words(number: int) -> str:
        drawn = torch.randint(SPECIAL, size.model["vocab_size"], (number,), generator=generator)
        return "".join(f" w{i}" for i in drawn.tolist())

    columns = {
        "SFT": {"text": size.prompt + size.answer},
        "DPO": {"prompt": size.prompt, "chosen": size.answer, "rejected": size.answer},
        "GRPO": {"prompt": size.question},
    }[trainer]
    return [{name: words(number) for name, number in columns.items()} for _ in range(count)]


def share_of_even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Reward answers for their even tokens."""
    return [sum(i % 2 == 0 for i in answer) / max(1, len(answer)) for answer in completion_ids]
