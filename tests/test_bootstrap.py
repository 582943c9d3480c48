"""tools/bootstrap.py: which torch it asks for, and that it asks only once."""

from __future__ import annotations

import importlib.util
import json
import platform
import sys
import tomllib
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "tools" / "bootstrap.py"


@pytest.fixture
def bootstrap(tmp_path, monkeypatch):
    """The script, with an own .venv, no GPU, no torch, and a pip that only takes notes."""
    spec = importlib.util.spec_from_file_location("bootstrap", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("TORCH", raising=False)
    monkeypatch.setattr(module, "RECORD", tmp_path / "bootstrap.json")
    monkeypatch.setattr(module, "PYTHON", SCRIPT)
    monkeypatch.setattr(module, "make_venv", lambda afresh: module.made.append(afresh))
    monkeypatch.setattr(module, "has_gpu", lambda: False)
    monkeypatch.setattr(module, "has_torch", lambda: False)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    module.asked, module.refused, module.made = [], set(), []

    def pip(*arguments, quiet=False):
        module.asked.append(arguments)
        return not any(r in arguments for r in module.refused)

    monkeypatch.setattr(module, "pip", pip)
    return module


def torches(bootstrap) -> list[tuple[str, bool]]:
    """List (requirement, whether PyTorch's CPU index was asked) in the order of asking."""
    alone = [a for a in bootstrap.asked if any(r.startswith("torch==") for r in a)]
    return [(a[-1], bootstrap.CPU_INDEX in a) for a in alone]


def test_cpu_build_from_its_own_index(bootstrap):
    bootstrap.main()
    assert torches(bootstrap) == [("torch==2.13.0+cpu", True)]


def test_cpu_build_from_the_usual_index_where_the_other_is_out_of_reach(bootstrap):
    bootstrap.refused = {bootstrap.CPU_INDEX}
    bootstrap.main()
    assert torches(bootstrap) == [("torch==2.13.0+cpu", True), ("torch==2.13.0+cpu", False)]


def test_never_a_cuda_build_without_a_gpu(bootstrap):
    bootstrap.refused = {"torch==2.13.0+cpu"}
    with pytest.raises(SystemExit, match="no CPU build of torch==2.13.0"):
        bootstrap.main()
    assert all(requirement.endswith("+cpu") for requirement, _ in torches(bootstrap))
    assert not bootstrap.RECORD.exists()


def test_wheels_for_macos_carry_no_mark(bootstrap, monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    bootstrap.main()
    assert torches(bootstrap) == [("torch==2.13.0", True)]


def test_usual_index_with_a_gpu(bootstrap, monkeypatch):
    monkeypatch.setattr(bootstrap, "has_gpu", lambda: True)
    bootstrap.main()
    assert torches(bootstrap) == [("torch==2.13.0", False)]


def test_the_user_may_name_another(bootstrap, monkeypatch):
    monkeypatch.setenv("TORCH", "torch==2.11.0")
    bootstrap.main()
    assert torches(bootstrap) == [("torch==2.11.0", False)]


def test_a_torch_that_is_there_is_kept(bootstrap, monkeypatch):
    monkeypatch.setattr(bootstrap, "has_torch", lambda: True)
    bootstrap.main()
    assert torches(bootstrap) == []


def test_the_second_time_does_nothing(bootstrap):
    bootstrap.main()
    before = len(bootstrap.asked)
    bootstrap.main()
    assert len(bootstrap.asked) == before > 0


def test_what_an_interruption_left_is_used_if_it_is_the_same_python_with_pip(
    bootstrap, monkeypatch, tmp_path
):
    monkeypatch.setattr(bootstrap, "PYTHON", tmp_path / "python")
    assert not bootstrap.usable()
    for status in (1, 0):
        bootstrap.PYTHON.write_text(f"#!/bin/sh\nexit {status}\n")
        bootstrap.PYTHON.chmod(0o755)
        bootstrap.main()
        bootstrap.RECORD.unlink()
    assert bootstrap.made == [True, False]

    monkeypatch.setattr(bootstrap, "PYTHON", Path(sys.executable))
    assert bootstrap.usable()
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 99, 0))
    assert not bootstrap.usable()


def test_peers_are_an_extra_that_nothing_here_installs(bootstrap):
    project = tomllib.loads((SCRIPT.parent.parent / "pyproject.toml").read_text())["project"]
    peers = set(project["optional-dependencies"]["peers"])
    assert all(peer.endswith("; platform_system == 'Linux'") for peer in peers)
    assert not peers & set(bootstrap.requirements(project, "dev"))


def test_a_failure_is_not_recorded(bootstrap):
    bootstrap.refused = {"einops>=0.8"}
    with pytest.raises(SystemExit, match="could not be installed"):
        bootstrap.main()
    assert not bootstrap.RECORD.exists()


def test_requirements_follow_extras_within_extras(bootstrap):
    project = {
        "name": "liger-fn",
        "dependencies": ["torch>=2"],
        "optional-dependencies": {
            "bench": ["plots"],
            "test": ["checks", "plots"],
            "dev": ["liger-fn[bench,test]", "style"],
        },
    }
    assert bootstrap.requirements(project, "dev") == ["torch>=2", "plots", "checks", "style"]


def test_what_was_done_is_recorded(bootstrap):
    bootstrap.main()
    record = json.loads(bootstrap.RECORD.read_text())
    assert record["python"] == platform.python_version()
    assert any(r.startswith("transformers") for r in record["requirements"])
