"""What compute-sanitizer is asked, and how its answers are read."""

from itertools import product

import pytest
import torch

from liger_fn.testing import call, sanitize
from liger_fn.testing.specs import specs

CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
RACE = """\
========= Error: Race reported between Write access at {kernel}+0x750 in room.py:120
=========     and Write access at {kernel}+0x750 in room.py:120 [1 hazards]
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
OUT_OF_BOUNDS = """\
========= Invalid __global__ write of size 4 bytes
=========     at _softmax_fwd_kernel+0x200 in softmax.py:4
========= ERROR SUMMARY: 1 error
"""


@pytest.mark.parametrize(
    ("code", "printed", "fault"),
    [
        (0, CLEAN, ""),
        (86, RACE.format(kernel="_rms_norm_fwd_kernel"), "FOUND"),
        (86, OUT_OF_BOUNDS, "FOUND"),
        (86, RACE.format(kernel="void other<int>").replace("Error: ", "Error: Other.\n"), "FOUND"),
        (86, "at 0xda0 in room.py:175:_softmax_fwd_kernel\nERROR SUMMARY: 1 error", "FOUND"),
        (86, "Program hit CUDA_ERROR_ILLEGAL_ADDRESS\nERROR SUMMARY: 1 error", "FOUND"),
        (86, "RACECHECK SUMMARY: 4 hazards displayed (0 errors, 4 warnings)", ""),
        # Kernels of PyTorch's are its own matter.
        (86, RACE.format(kernel="void cutlass::device_kernel<at::cuda>"), ""),
        # Whoever was not watched to the end is not clean.
        (1, CLEAN, "failed (1)"),
        (0, "Error: Device not supported", "failed (0)"),
    ],
)
def test_a_report_is_read(code, printed, fault):
    assert sanitize.fault_of(code, printed) == fault


def test_each_op_has_a_line_and_each_tool_a_column():
    verdicts = [
        sanitize.Verdict("rope", "float32", "memcheck", 3.2),
        sanitize.Verdict("rope", "float32", "racecheck", 3.0, "failed (-11)"),
        sanitize.Verdict("rope", "float16", "memcheck", 1.2),
        sanitize.Verdict("rope", "float16", "racecheck", 4.0, "FOUND"),
        sanitize.Verdict("tvd", "float32", "memcheck", 1.0),
        sanitize.Verdict("tvd", "float32", "racecheck", 1.0),
    ]
    head, *lines = sanitize.table(verdicts, ["rope", "tvd"]).splitlines()
    assert head.split() == ["op", "memcheck", "racecheck"]
    assert lines[0].split() == ["rope", "clean", "4", "s", "FOUND", "7", "s"]
    assert lines[1].split() == ["tvd", "clean", "1", "s", "clean", "1", "s"]


def test_an_unknown_op_is_refused(capsys):
    assert sanitize.main(["no_such_op"]) == 2
    assert "sanitize: 'no_such_op' must be one of attention_residual" in capsys.readouterr().err


def test_the_interpreter_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(sanitize, "interpreted", lambda: True)
    assert sanitize.main(["rope"]) == 2
    assert "TRITON_INTERPRET must be unset" in capsys.readouterr().err


@pytest.mark.parametrize("gpu", [False, True])
def test_what_is_missing_is_said(gpu, capsys, monkeypatch):
    monkeypatch.setattr(sanitize, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(sanitize.shutil, "which", lambda *a, **k: None)
    assert sanitize.main(["rope"]) == 2
    wanted = "needs compute-sanitizer" if gpu else "needs a GPU"
    assert wanted in capsys.readouterr().err


@pytest.mark.parametrize("found", [False, True])
def test_every_op_goes_through_every_tool(found, capsys, monkeypatch, tmp_path):
    """A program in place of the tool says what it was asked, and finds what it is told to."""
    tool = tmp_path / "compute-sanitizer"
    end = OUT_OF_BOUNDS if found else CLEAN
    tool.write_text(f"#!/bin/sh\necho \"$PYTORCH_NO_CUDA_MEMORY_CACHING $@\"\necho '{end}'\n"
                    f"exit {86 * found}\n")  # fmt: skip
    tool.chmod(0o755)
    monkeypatch.setattr(sanitize, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitize.shutil, "which", lambda *a, **k: str(tool))
    out = tmp_path / "reports"
    assert sanitize.main(["rope", "tvd", "--out", str(out)]) == int(found)
    printed = capsys.readouterr().out
    assert f"{0 if found else 12} of 12 runs are clean" in printed
    assert printed.count("FOUND" if found else "clean") >= 4
    reports = sorted(f.name for f in out.glob("*"))
    runs = product(("rope", "tvd"), sorted(sanitize.DTYPES), ("memcheck", "racecheck"))
    assert reports == (["-".join(run) + ".txt" for run in runs] if found else [])
    if found:
        asked = (out / "tvd-float16-racecheck.txt").read_text()
        assert asked.startswith("1 --tool racecheck")
        assert "--launch-timeout 0 " in asked
        here = "-m liger_fn.testing.sanitize --here tvd --dtype float16"
        assert asked.splitlines()[0].endswith(here)


def test_one_tool_and_dtype_may_be_asked_alone_and_so_many_at_once(monkeypatch, capsys):
    asked, jobs = [], []

    def under(program, tool, op, dtype, out):
        asked.append((op, dtype, tool))
        return sanitize.Verdict(op, dtype, tool, 1.0)

    pool = sanitize.ThreadPoolExecutor
    monkeypatch.setattr(sanitize, "ThreadPoolExecutor", lambda n: jobs.append(n) or pool(n))
    monkeypatch.setattr(sanitize, "_under", under)
    monkeypatch.setattr(sanitize, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitize.shutil, "which", lambda *a, **k: "tool")
    assert sanitize.main(["rope", "--tool=racecheck", *["--dtype=bfloat16"] * 2, "--jobs=3"]) == 0
    assert (asked, jobs) == ([("rope", "bfloat16", "racecheck")], [3])
    assert "1 of 1 runs are clean" in capsys.readouterr().out


def test_an_op_is_run_both_ways_in_every_case_and_dtype(monkeypatch):
    kept, kept_op, run, plainly = call.gradients, call.Call.op, [], []

    def noted(f, tensors):
        run.append((f, tensors[0].dtype, tensors[0].shape))
        return kept(f, tensors)

    def noted_op(of):
        def op(*tensors):
            plainly.extend([] if torch.is_grad_enabled() else [tensors])
            return kept_op(of)(*tensors)

        return op

    monkeypatch.setattr(call, "gradients", noted)
    monkeypatch.setattr(call.Call, "op", noted_op)
    sanitize.run_here(["relu_squared"], tuple(sanitize.DTYPES))
    (spec,) = (spec for spec in specs() if spec.name == "relu_squared")
    assert len(run) == len(plainly) == len(sanitize.DTYPES) * len(spec.cases + spec.sizes)
    assert {dtype for _, dtype, _ in run} == set(sanitize.DTYPES.values())
