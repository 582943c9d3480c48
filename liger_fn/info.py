"""What this machine has, and what liger_fn will do on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

import liger_fn
from liger_fn.functional.core import backend

PACKAGES = ("triton", "transformers", "einops")


def gather(device: torch.device | None = None) -> dict[str, str]:
    """Collect versions, the device and the backend that will run there, as words for a person."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, why = backend.why(device)
    facts = {"liger_fn": liger_fn.__version__, "python": platform.python_version()}
    # Only the module says for which CUDA it was built.
    facts |= {"torch": torch.__version__}
    facts |= {package: version(package) for package in PACKAGES}
    return facts | describe(device) | {"backend": f"{name}: {why}"}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe(device: torch.device) -> dict[str, str]:
    if device.type != "cuda":
        return {
            "device": f"{device}: {platform.machine()}, {os.cpu_count()} cores",
            "threads": str(torch.get_num_threads()),
            "compute capability": "none: not a CUDA device",
            "memory": host_memory(),
        }
    facts = torch.cuda.get_device_properties(device)
    return {
        "device": f"{device}: {facts.name}, {facts.multi_processor_count} multiprocessors",
        "compute capability": f"{facts.major}.{facts.minor}",
        "memory": f"{facts.total_memory / 2**30:.1f} GiB",
    }


def host_memory() -> str:
    if not hasattr(os, "sysconf"):
        return "not known on this system"
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"


def main() -> int:
    """Print the facts, one a line."""
    facts = gather()
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:<{width}}  {fact}")
    return 0
