"""Every op under NVIDIA's compute-sanitizer: accesses out of bounds, and races in shared memory.

`python -m liger_fn.testing.sanitize` runs each op forward and backward, in all its cases and ragged
sizes and in float32, bfloat16 and float16, under memcheck and racecheck, and prints a table. Memory
that PyTorch would keep is given back, so that a step past the end of a tensor is one out of bounds.
What a tool says of an op that it does not pass is written to a file. One process an op, a dtype and
a tool, several at once: to prepare each kernel for the tools takes them longer than to run it.
PyTorch's own kernels do not count. Needs a GPU, and compute-sanitizer, which comes with CUDA's
toolkit.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

from liger_fn.functional.core.launch import TRITON_MISSING, interpreted

TOOLS = ("memcheck", "racecheck")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FOUND = 86
# Triton leaves names as they are; C++ mangles them.
_OURS = r"_[a-z]\w*_kernel"
# racecheck breaks products of PyTorch's that it is told to leave out.
_OPTIONS = {"memcheck": ["--kernel-name", f"regex=^{_OURS}$"], "racecheck": []}
_TOOLKIT = "/usr/local/cuda/bin"


@dataclass(frozen=True)
class Verdict:
    """What a tool says of an op in a dtype: nothing where it passes."""

    op: str
    dtype: str
    tool: str
    seconds: float
    fault: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the ops, print the table, and return 1 if a tool found something or could not run."""
    options = _parser().parse_args(arguments)
    dtypes = [dtype for dtype in DTYPES if dtype in (options.dtype or DTYPES)]
    if options.here:
        run_here(options.ops, dtypes)
        return 0

    from liger_fn.testing.specs import specs

    known = [spec.name for spec in specs()]
    for op in options.ops:
        if op not in known:
            return _refuse(f"{op!r} must be one of {', '.join(known)}")
    if TRITON_MISSING or interpreted():
        return _refuse("needs Triton, and TRITON_INTERPRET must be unset")
    if not torch.cuda.is_available():
        return _refuse("needs a GPU, and PyTorch sees none")
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=_TOOLKIT)
    if program is None:
        return _refuse("needs compute-sanitizer, of CUDA's toolkit, on the path")

    ops, out = options.ops or known, Path(options.out)
    tools = [tool for tool in TOOLS if tool in (options.tool or TOOLS)]
    verdicts = list(_all(program, ops, dtypes, tools, options.jobs, out))
    print(table(verdicts, ops))
    wrong = sum(bool(v.fault) for v in verdicts)
    reports = f"; the reports of the others are in {out}/" if wrong else ""
    print(f"{len(verdicts) - wrong} of {len(verdicts)} runs are clean{reports}")
    return int(wrong > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m liger_fn.testing.sanitize", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help="default: every op")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="default: both")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default: all three")
    parser.add_argument("--jobs", type=int, default=8, metavar="N", help="processes at once")
    parser.add_argument("--out", default="sanitize", metavar="DIR", help="where reports go")
    parser.add_argument("--here", action="store_true", help="run the ops in this very process")
    return parser


def _refuse(reason: str) -> int:
    print(f"sanitize: {reason}", file=sys.stderr)
    return 2


def run_here(ops: Sequence[str], dtypes: Sequence[str]) -> None:
    """Run ops forward and backward; whoever wants to know watches from outside."""
    from liger_fn.testing.call import Call, gradients
    from liger_fn.testing.specs import specs

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for spec in specs():
        if spec.name in ops:
            for case in spec.cases + spec.sizes:
                for dtype in dtypes:
                    call = Call(spec, case, device, DTYPES[dtype])
                    gradients(call.op(), call.tensors(requires_grad=True))
                    with torch.no_grad():
                        call.op()(*call.tensors())
    if device.type == "cuda":
        torch.cuda.synchronize()


def _all(
    program: str,
    ops: Sequence[str],
    dtypes: Sequence[str],
    tools: Sequence[str],
    jobs: int,
    out: Path,
) -> Iterator[Verdict]:
    from tqdm import tqdm

    def by_each_tool(op: str, dtype: str) -> list[Verdict]:
        # One after the other: the first compiles the kernels for both.
        return [_under(program, tool, op, dtype, out) for tool in tools]

    with ThreadPoolExecutor(jobs) as pool:
        runs = [pool.submit(by_each_tool, op, dtype) for op in ops for dtype in dtypes]
        with tqdm(as_completed(runs), total=len(runs), unit="run", leave=False) as bar:
            for run in bar:
                verdicts = run.result()
                bar.write(line(f"{verdicts[0].op} {verdicts[0].dtype}", verdicts, tools))
                yield from verdicts


def _under(program: str, tool: str, op: str, dtype: str, out: Path) -> Verdict:
    """Run an op in a process of its own under a tool.

    The tool waits for the process as long as it takes: from one that imports PyTorch beside many
    others it would turn away after ten seconds, and this then waits for the tool for ever.
    """
    report = out / f"{op}-{dtype}-{tool}.txt"
    report.unlink(missing_ok=True)
    start = time.perf_counter()
    done = subprocess.run(
        [program, "--tool", tool, "--error-exitcode", str(_FOUND),
         "--target-processes", "application-only", "--launch-timeout", "0", *_OPTIONS[tool],
         sys.executable, "-m", "liger_fn.testing.sanitize", "--here", op, "--dtype", dtype],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    seconds = time.perf_counter() - start
    fault = fault_of(done.returncode, done.stdout)
    if fault:
        out.mkdir(parents=True, exist_ok=True)
        report.write_text(done.stdout)
    return Verdict(op, dtype, tool, seconds, fault)


def fault_of(code: int, printed: str) -> str:
    """Give what a run has against an op, in a word or two, or nothing."""
    # Without its last line a tool has not watched to the end, whatever the program returned.
    if code not in (0, _FOUND) or "SUMMARY: " not in printed:
        return f"failed ({code})"
    if code == 0 or "(0 errors, " in printed:
        return ""
    races = re.findall(r"Error: Race reported between \w+ access at (.+?)\+0x", printed)
    # What names no kernel, or none as this toolkit does, is taken for ours.
    not_ours = races and not any(re.fullmatch(_OURS, name) for name in races)
    return "" if not_ours and len(races) == printed.count("Error: ") else "FOUND"


def table(verdicts: Sequence[Verdict], ops: Sequence[str]) -> str:
    """Ops down, tools across: what is held against an op in any dtype, and the seconds of all."""
    tools = [tool for tool in TOOLS if any(v.tool == tool for v in verdicts)]
    head = f"{'op':40}" + "".join(f"{tool:>24}" for tool in tools)
    rows = (line(op, [v for v in verdicts if v.op == op], tools) for op in ops)
    return "\n".join([head, *rows])


def line(title: str, verdicts: Sequence[Verdict], tools: Sequence[str]) -> str:
    """The verdicts of each tool in one cell."""
    cells = []
    for tool in tools:
        own = [v for v in verdicts if v.tool == tool]
        # What was found weighs more than what could not be watched.
        faults = sorted((v.fault for v in own if v.fault), key=lambda fault: fault != "FOUND")
        fault = faults[0] if faults else "clean"
        cells.append(f"{fault} {sum(v.seconds for v in own):5.0f} s")
    return f"{title:40}" + "".join(f"{cell:>24}" for cell in cells)


if __name__ == "__main__":
    sys.exit(main())
