"""`python -m liger_fn`: its commands, what it prints, and what it does not import."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import liger_fn
from liger_fn import info
from liger_fn.__main__ import main
from liger_fn.functional.core import backend

ROOT = Path(liger_fn.__file__).parent.parent


def python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_without_arguments_it_helps():
    done = python("-m", "liger_fn")
    assert done.returncode == 0
    for command in ("info", "verify", "train", "models"):
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"]])
def test_help(capsys, arguments):
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("usage: python -m liger_fn COMMAND")


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"liger_fn {liger_fn.__version__}\n"


def test_unknown_command(capsys):
    assert main(["tarin"]) == 2
    assert "must be one of info, verify, train, models; got 'tarin'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "statement",
    [
        "import liger_fn",
        "from liger_fn.__main__ import main; main(['--help'])",
        "from liger_fn.__main__ import main; main(['train', '--help'])",
        "from liger_fn.__main__ import main; main(['info', '--help'])",
        "from liger_fn.__main__ import main; main(['models', '--help'])",
    ],
)
def test_starts_without_anything_heavy(statement):
    code = (
        f"import sys, contextlib\nwith contextlib.suppress(SystemExit):\n    {statement}\n"
        "sys.exit(len({'torch', 'triton', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_parts_are_imported_when_named():
    code = (
        "import sys, liger_fn\n"
        "assert 'liger_fn.functional' not in sys.modules\n"
        "assert callable(liger_fn.functional.rms_norm)\n"
        "assert 'transformers' not in sys.modules"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_parts_are_listed():
    assert {"functional", "hf", "nn", "testing"} <= set(dir(liger_fn))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = liger_fn.nothing


def test_info_says_what_will_run(capsys):
    assert main(["info"]) == 0
    facts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert facts["torch"] == torch.__version__
    assert facts["liger_fn"] == liger_fn.__version__
    assert {"python", "triton", "transformers", "einops", "device", "memory"} <= facts.keys()
    assert facts["backend"].startswith(f"{expected_backend()}: ")


def expected_backend() -> str:
    return "kernels" if torch.cuda.is_available() else "interpreter"


def test_info_follows_the_backend_in_force():
    with backend.using("reference"):
        assert info.gather(torch.device("cpu"))["backend"].startswith("reference: ")


def test_info_without_a_package(monkeypatch):
    monkeypatch.setattr(info, "PACKAGES", ("a-package-that-is-not-there",))
    assert info.gather()["a-package-that-is-not-there"] == "not installed"


def test_info_takes_no_arguments(capsys):
    with pytest.raises(SystemExit):
        main(["info", "--fast"])
    assert "unrecognized arguments: --fast" in capsys.readouterr().err


@pytest.mark.parametrize("status", [0, 1])
def test_verify_hands_its_arguments_on(monkeypatch, status):
    got = []
    program = types.ModuleType("liger_fn.testing.verify")
    program.main = lambda arguments: got.append(arguments) or status
    monkeypatch.setitem(sys.modules, "liger_fn.testing.verify", program)
    assert main(["verify", "rms_norm", "--quick"]) == status
    assert got == [["rms_norm", "--quick"]]


def test_train_answers_bad_input_with_status_2(capsys):
    assert main(["train", "--text", "/nowhere", "--device", "cpu", "--out", "/tmp"]) == 2
    assert "got /nowhere" in capsys.readouterr().err
