"""The table of all that liger-kernel has: its lines are true, and the README shows it."""

from __future__ import annotations

import operator
import re
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import catalogue
from benchmarks.catalogue import BEGIN, END, ENTRIES
from benchmarks.report import Row
from liger_fn import functional
from liger_fn.testing.specs import specs

ROOT = Path(__file__).parents[1]


def row(provider, ms, mode="fwd", **facts) -> Row:
    fixed = {"op": "dyt", "shape": "8192x4096", "dtype": "bfloat16", "status": "ok"}
    fixed |= {"device": "a chip", "torch": "2", "triton": "3", "commit": "abc", "floor": 0.5}
    return Row(provider=provider, ms=ms, mode=mode, **{**fixed, **facts})


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.peer)
def test_a_line_names_what_is_there(entry):
    for name in entry.ours:
        assert callable(operator.attrgetter(name)(functional))
    if entry.shape:
        spec = next(s for s in specs() if s.name == entry.ours[0])
        assert entry.shape in [b.id for b in spec.benchmarks]
    if entry.test:
        path, name = entry.test.split("::")
        text = (ROOT / "tests" / path).read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(", text, re.MULTILINE)


def test_every_op_that_is_measured_has_a_line():
    shown = {name for entry in ENTRIES for name in entry.ours}
    assert {spec.name for spec in specs()} <= shown | {"soft_target_cross_entropy"}


def test_a_line_of_each_kind():
    rows = [
        row("liger_fn", 2.0),
        row("liger", 3.0),
        row("liger-cute", 2.5),
        row("compile", 1.5),
        row("torch", 4.0),
        row("eager", 1.0),
        row("liger_fn-2048", 1.0),
        row("liger_fn", 9.0, device="another"),
        row("liger_fn", 5.0, mode="full"),
        row("liger", None, mode="full", status="failed"),
    ]
    lines = catalogue.section(rows).splitlines()
    assert lines[0] == "a chip, bfloat16; torch 2, triton 3; commit abc:"
    (dyt,) = [line for line in lines if line.startswith("| DyT |")]
    assert "| **2** (50%); liger-cute 2.5; compile 1.5 |" in dyt
    assert "| **5** (50%); liger failed |" in dyt
    assert sum("not measured" in line for line in lines) > 20
    assert len(lines) == 2 + 2 + len(ENTRIES)
    assert catalogue.section([]) == catalogue.NOTHING


def test_insertion(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}{END}\nafter\n")
    assert benchmarks.main(["--insert", str(page)]) == 0
    assert "| RMSNorm | `rms_norm` |" in page.read_text()
    page.write_text("no markers")
    assert benchmarks.main(["--insert", str(page)]) == 2


def test_the_readme_shows_what_is_committed():
    """`python -m benchmarks --insert README.md` would change nothing."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    between = text.split(BEGIN)[1].split(END)[0].strip()
    assert between == catalogue.section(catalogue.committed(ROOT / "benchmarks" / "results"))
