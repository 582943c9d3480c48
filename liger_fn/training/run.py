"""The main job, in order: text, tokens, the runs, the report, the saved model and its sample."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from liger_fn import info
from liger_fn.training import model as models
from liger_fn.training import options, report, text
from liger_fn.training.loop import Run, Settings, train
from liger_fn.training.options import BadInput

SAMPLE_TOKENS = 160


def main(asked: argparse.Namespace) -> int:
    """Carry out `python -m liger_fn train` and return its exit status."""
    try:
        return carry_out(asked)
    except BadInput as reason:
        print(reason, file=sys.stderr)
        return 2


def carry_out(asked: argparse.Namespace) -> int:
    # transformers' own bars and notes would run into ours.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    names = options.providers(asked.providers)
    settings = settle(asked)
    choose_threads(asked, settings)
    out = make_directory(asked.out)
    facts = info.gather(settings.device)
    say("device", facts["device"])
    say("backend", facts["backend"])

    material = prepare(asked, settings)
    runs = [carry_out_one(name, asked, settings, material) for name in names[:-1]]
    runs.append(carry_out_one(names[-1], asked, settings, material, keep_in=out / "model"))

    print(f"\n{report.table(runs)}\n")
    keep(out, asked, settings, facts, runs)
    print(f"\nsample of {names[-1]}, loaded from {out / 'model'}:\n")
    print(sample(out / "model", asked.prompt, settings))
    return verdict(runs, asked.tolerance or report.TOLERANCE[settings.dtype], settings)


def say(name: str, fact: str) -> None:
    print(f"{name:<9}  {fact}", flush=True)


@dataclasses.dataclass(frozen=True)
class Material:
    """What all runs share."""

    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig
    tokens: torch.Tensor
    held_out: torch.Tensor


def prepare(asked: argparse.Namespace, settings: Settings) -> Material:
    """Read the text and the config, and turn the text into tokens."""
    files = text.files_under(asked.text) if asked.text else text.standard_library()
    documents = text.read(files)
    gpu = settings.device.type == "cuda"
    vocab = asked.vocab or ("32768" if gpu else "bytes")
    tokenizer = models.pick_tokenizer(asked.config, vocab, documents)
    config = models.pick_config(asked.config, tokenizer, settings.seq, large=gpu)

    tokens, held_out = text.split(text.encode(tokenizer, documents), settings.seq)
    say(
        "text",
        f"{len(files):,} files, {tokens.numel():,} tokens to train on,"
        f" {held_out.numel():,} held out; vocabulary of {len(tokenizer):,}",
    )
    return Material(tokenizer, config, tokens, held_out)


def carry_out_one(
    name: str,
    asked: argparse.Namespace,
    settings: Settings,
    material: Material,
    keep_in: Path | None = None,
) -> Run:
    """Make the model, patch it or not, train it, and save it in `keep_in`."""
    model = models.make_model(
        material.config, asked.config, settings.seed, settings.weight_dtype, settings.device
    )
    replaced = models.PATCHES[name](model)
    of = (
        f"{type(model).__name__}, {model.num_parameters():,} parameters, {settings.dtype};"
        f" {settings.steps} steps of {settings.batch} x {settings.seq} tokens"
    )
    say(name, of)
    if replaced is not None:
        print(f"\n{replaced}\n", flush=True)
    run = Run(name, of)
    train(run, model, material.tokens, material.held_out, settings)
    if keep_in:
        model.save_pretrained(keep_in)
        material.tokenizer.save_pretrained(keep_in)

    # The next run's peak memory must not count this one's model.
    del model, replaced
    gc.collect()
    torch.cuda.empty_cache()
    return run


def settle(asked: argparse.Namespace) -> Settings:
    """Fill in what was not asked for, by the device."""
    device = pick_device(asked.device)
    gpu = device.type == "cuda"
    return Settings(
        steps=asked.steps or (200 if gpu else 300),
        batch=asked.batch or 16,
        seq=asked.seq or (1024 if gpu else 128),
        lr=asked.lr or (6e-4 if gpu else 2e-3),
        seed=asked.seed,
        device=device,
        dtype=asked.dtype or ("bfloat16" if gpu else "float32"),
        compile=asked.compile,
    )


def choose_threads(asked: argparse.Namespace, settings: Settings) -> None:
    # The built-in model for CPUs is so small that it gains little from a second thread; and where
    # other programs want the cores too, threads that wait for each other slow it down many times.
    if asked.threads or (asked.config is None and settings.device.type == "cpu"):
        torch.set_num_threads(asked.threads or 1)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as reason:
        first_line = str(reason).partition("\n")[0]
        raise BadInput(
            f"train: `--device` must be one that works here; got {name}: {first_line}"
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"train: `--device` must be cpu or cuda; got {name}.")
    return device


def make_directory(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise BadInput(
            f"train: `--out` must be a directory that can be made; got {path}: {reason.strerror}."
        ) from None
    return path


def keep(
    out: Path,
    asked: argparse.Namespace,
    settings: Settings,
    facts: dict[str, str],
    runs: list[Run],
) -> None:
    """Write losses.csv, settings.json and, unless it is unwanted or impossible, loss.png."""
    report.write_csv(out / "losses.csv", runs)
    report.write_json(out / "settings.json", recorded(asked, settings, facts), runs)
    written = ["losses.csv", "settings.json", "model/"]
    if asked.no_plot:
        pass
    elif importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
    else:
        title = f"{runs[0].of}\n{facts['device'].partition(': ')[2]}"
        report.plot(out / "loss.png", runs, title)
        written.append("loss.png")
    print(f"written to {out}{os.sep}: {', '.join(written)}")


def recorded(
    asked: argparse.Namespace, settings: Settings, facts: dict[str, str]
) -> dict[str, Any]:
    plain = {**vars(asked), **dataclasses.asdict(settings)}
    return {**{k: printable(v) for k, v in plain.items()}, "machine": facts}


def printable(value: Any) -> Any:
    if isinstance(value, list):
        return [printable(v) for v in value]
    return str(value) if isinstance(value, (Path, torch.device)) else value


def sample(directory: Path, prompt: str, settings: Settings) -> str:
    """Load the saved model and tokenizer as a user would, and continue `prompt`."""
    from transformers import AutoTokenizer

    from liger_fn.hf import AutoLigerKernelForCausalLM

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
    model = AutoLigerKernelForCausalLM.from_pretrained(directory, dtype=settings.weight_dtype)
    model = models.placed(model, settings.device).eval()
    given = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(settings.device)
    torch.manual_seed(settings.seed)
    written = model.generate(
        input_ids=given["input_ids"],
        attention_mask=given["attention_mask"],
        max_new_tokens=SAMPLE_TOKENS,
        do_sample=True,
        temperature=0.7,
        top_k=40,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(written[0], skip_special_tokens=True))


def verdict(runs: list[Run], tolerance: float, settings: Settings) -> int:
    """Say in words whether the losses agree, and return the exit status."""
    if settings.device.type == "cpu":
        print(
            "\nOn a CPU the reference path runs: no gain in speed or memory is to be expected here."
        )
    if len(runs) < 2:
        return 0
    gap = report.largest_difference(runs)
    agree = gap <= tolerance
    print(
        f"\nThe losses {'agree' if agree else 'DIFFER'}: the largest difference over"
        f" {settings.steps} steps is {gap:.1e}, the tolerance for {settings.dtype} {tolerance:.0e}."
    )
    return 0 if agree else 1
