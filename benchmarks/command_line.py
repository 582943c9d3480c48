"""What the command lines of the benchmarks share: lists of names, devices, the commit."""

import argparse
import platform
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path

import torch


def among(
    parser: argparse.ArgumentParser, name: str, given: str, known: Collection[str]
) -> list[str]:
    """Split a list of names at its commas; end the program if one is not known."""
    chosen = [word for word in given.split(",") if word]
    for word in chosen:
        if word not in known:
            parser.error(f"{name}: {word!r} is not one of {', '.join(known)}")
    return list(dict.fromkeys(chosen))


def names_a_mode(argv: Sequence[str] | None, modes: Collection[str]) -> bool:
    """Say whether a command line has --mode with one of these, which have options of their own."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--mode", default="")
    return parser.parse_known_args(argv)[0].mode in modes


def device(text: str) -> torch.device:
    """A device that is here, of a kind that can be timed."""
    try:
        named = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a device") from None
    if named.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda; got {text!r}")
    if named.type == "cuda" and (named.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"torch {torch.__version__} sees no {text!r} here")
    return named


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def commit(root: Path) -> str:
    """The checked-out commit, `-dirty` if files differ from it; results and plots do not count."""
    git = ("git", "-C", str(root))
    ours = ("--", ".", ":!benchmarks/results", ":!benchmarks/plots")
    try:
        run = {"check": True, "capture_output": True, "text": True}
        head = subprocess.run((*git, "rev-parse", "--short=12", "HEAD"), **run).stdout.strip()
        changed = subprocess.run((*git, "status", "--porcelain", *ours), **run).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if changed else "")
