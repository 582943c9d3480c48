"""Make .venv with all that `make test` and `make demo` need. Standard library only.

Which torch, in this order:
  1. the Python's own, where it works on this machine's NVIDIA GPU (nothing is downloaded again);
  2. with an NVIDIA GPU, or where $TORCH names a requirement: that one from the usual index;
  3. otherwise the CPU build: from PyTorch's own CPU index, else from the usual index. Never CUDA.

The project itself runs from the clone. What was done is written to .venv/bootstrap.json; as long as
that and pyproject.toml do not change, running this again does nothing.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
RECORD = VENV / "bootstrap.json"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

TORCH = "torch==2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PRINT_SITE = "import sysconfig; print(sysconfig.get_path('purelib'))"
GPU_PROBE = """
import sys, torch
old = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < (2, 11)
sys.exit(old or not torch.cuda.is_available())
"""


def say(line: str) -> None:
    print(f"bootstrap: {line}", flush=True)


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {
        "python": platform.python_version(),
        "torch": os.environ.get("TORCH"),
        "requirements": requirements(project, "dev"),
    }
    found = json.loads(RECORD.read_text()) if PYTHON.exists() and RECORD.exists() else {}
    if found == wanted:
        return

    make_venv(afresh=not usable())
    if wanted["torch"] or not has_torch():
        install_torch(wanted["torch"])
    say("installing the other requirements of pyproject.toml")
    if not pip("install", *wanted["requirements"]):
        sys.exit("bootstrap: a requirement could not be installed; pip's reason is above")
    RECORD.write_text(json.dumps(wanted, indent=2) + "\n")
    say("done: .venv is ready")


def requirements(project: dict, extra: str) -> list[str]:
    """List the dependencies and one extra, with the extras that it names in turn."""
    listed = list(project["dependencies"])
    for requirement in project["optional-dependencies"][extra]:
        if requirement.startswith(project["name"] + "["):
            for inner in requirement.partition("[")[2].rstrip("]").split(","):
                listed += project["optional-dependencies"][inner]
        else:
            listed.append(requirement)
    return list(dict.fromkeys(listed))


def usable() -> bool:
    """Whether what is in .venv, perhaps after an interruption, is a Python like ours with pip."""
    ours = f"import pip, sys; sys.exit(sys.version_info[:2] != {tuple(sys.version_info[:2])})"
    return succeeds(PYTHON, "-c", ours)


def make_venv(afresh: bool) -> None:
    own = has_gpu() and succeeds(sys.executable, "-c", GPU_PROBE)
    if own:
        say(f"{sys.executable} has a torch that works on the GPU here: .venv uses it")
    else:
        say(f"making .venv with Python {platform.python_version()}")
    options = ["--system-site-packages"] * own + ["--clear"] * afresh
    if subprocess.run([sys.executable, "-m", "venv", *options, str(VENV)]).returncode:
        sys.exit(
            "bootstrap: `python -m venv` failed (Debian, Ubuntu: apt-get install python3-venv)"
        )

    # "System" means the Python under a virtual environment, so one that we run in is named apart.
    if own and sys.prefix not in (sys.base_prefix, str(VENV)):
        site = subprocess.check_output([PYTHON, "-c", PRINT_SITE], text=True).strip()
        Path(site, "parent_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")


def has_gpu() -> bool:
    smi = shutil.which("nvidia-smi")
    return smi is not None and succeeds(smi, "-L")


def has_torch() -> bool:
    return succeeds(PYTHON, "-c", "import torch")


def succeeds(*command: str | Path) -> bool:
    quiet = subprocess.DEVNULL
    try:
        return subprocess.run(command, stdout=quiet, stderr=quiet).returncode == 0
    except OSError:  # no such program, or half of one
        return False


def install_torch(named: str | None) -> None:
    if named or has_gpu():
        requirement = named or TORCH
        say(f"installing {requirement} from the usual index")
        if not pip("install", requirement):
            sys.exit(f"bootstrap: {requirement} could not be installed; pip's reason is above")
        return

    # PyTorch marks its CPU builds for Linux and Windows `+cpu`; the usual index may have one too.
    marked = TORCH if platform.system() == "Darwin" else TORCH + "+cpu"
    say(f"no NVIDIA GPU: installing the CPU build of torch, asking {CPU_INDEX} first")
    impatient = ("--timeout", "10", "--retries", "0")
    if pip("install", "--no-deps", "--index-url", CPU_INDEX, *impatient, marked, quiet=True):
        return
    say(f"that index does not answer here: installing {marked} from the usual one")
    if not pip("install", marked):
        sys.exit(
            f"bootstrap: no CPU build of {TORCH} for Python {platform.python_version()} was found;"
            " to take another, say for example: make test TORCH='torch==2.13.0'"
        )


def pip(*arguments: str, quiet: bool = False) -> bool:
    command = [PYTHON, "-m", "pip", "--disable-pip-version-check", *arguments, "--quiet"]
    return subprocess.run(command, stderr=subprocess.DEVNULL if quiet else None).returncode == 0


if __name__ == "__main__":
    main()
