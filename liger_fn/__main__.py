"""The commands of `python -m liger_fn`. Each imports what it needs when it is chosen."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import liger_fn

HELP = """\
usage: python -m liger_fn COMMAND [OPTION ...]

  info     versions, the device, and which backend will run on it and why
  verify   check every op on this machine against PyTorch, and print a table
  train    train a model unpatched and patched, and compare losses, speed and memory
  models   try every model type of transformers, and print which ops it gets and why not the rest

Each command has its own --help.
"""


def info(arguments: list[str]) -> int:
    import argparse

    argparse.ArgumentParser("python -m liger_fn info").parse_args(arguments)
    from liger_fn.info import main

    return main()


def verify(arguments: list[str]) -> int:
    from liger_fn.testing.verify import main

    return main(arguments)


def train(arguments: list[str]) -> int:
    from liger_fn.training import options

    # --help and misspelt options are answered before anything heavy is imported.
    asked = options.parser().parse_args(arguments)
    from liger_fn.training.run import main

    return main(asked)


def models(arguments: list[str]) -> int:
    import argparse

    tasks = ("causal-lm", "image-text-to-text")
    parser = argparse.ArgumentParser(
        "python -m liger_fn models",
        description="Make every model type of transformers small, train it for a step untouched "
        "and with everything applied, compare, and say which ops it gets and why not the rest. "
        "Needs no network; takes about a minute.",
    )
    parser.add_argument("task", nargs="?", choices=tasks, help="default: both tasks")
    parser.add_argument("--only", nargs="+", default=[], metavar="TYPE", help="only these types")
    parser.add_argument("--markdown", action="store_true", help="only the table of the README")
    asked = parser.parse_args(arguments)
    # Some configurations would ask the network for one of their parts.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from liger_fn.testing.architectures import main

    try:
        return main([asked.task] if asked.task else list(tasks), asked.only, asked.markdown)
    except ValueError as error:
        parser.error(str(error))


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "info": info,
    "verify": verify,
    "train": train,
    "models": models,
}


def main(arguments: list[str]) -> int:
    """Run the command that the arguments name, and return the exit status."""
    name, *rest = arguments or ["--help"]
    if name in COMMANDS:
        return COMMANDS[name](rest)
    if name in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if name in ("-V", "--version"):
        print(f"liger_fn {liger_fn.__version__}")
        return 0
    print(
        f"liger_fn: the command must be one of {', '.join(COMMANDS)}; got {name!r}.\n\n{HELP}",
        file=sys.stderr,
        end="",
    )
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
