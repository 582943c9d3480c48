"""Every kernel of every spec, compiled for chips that need not be here.

`python -m liger_fn.testing.compilation` prints what each costs: registers a thread, bytes a thread
that do not fit into them (spills), and shared memory a program. Sizes and strides are taken to be
multiples of 16, but for those that a kernel does not specialize for: such launches load the widest
vectors, and need the most registers.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from liger_fn.functional.core.direct import OPTIONS
from liger_fn.functional.core.launch import TRITON_MISSING, interpreted
from liger_fn.testing.spec import Compilation
from liger_fn.testing.specs import specs

CHIPS = (80, 90, 100)
# A few spilled words stay in the first-level cache and cost nothing that can be measured.
SPILLS_ALLOWED = 32


@dataclass(frozen=True)
class Compiled:
    """What a kernel became on a chip; `error` if it did not compile."""

    op: str
    kernel: str
    chip: int
    registers: int = 0
    spills: int = 0
    shared: int = 0
    error: str = ""
    matters: bool = True

    def passes(self, spills_allowed: int) -> bool:
        return not self.error and (self.spills <= spills_allowed or not self.matters)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table, and return 1 if a kernel fails or spills more than is allowed."""
    parser = argparse.ArgumentParser("python -m liger_fn.testing.compilation", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help="default: every op")
    parser.add_argument("--chips", type=int, nargs="+", default=CHIPS, metavar="SM")
    parser.add_argument("--spills", type=int, default=SPILLS_ALLOWED, help="bytes a thread allowed")
    options = parser.parse_args(arguments)
    if TRITON_MISSING or interpreted():
        print("compilation: needs Triton, and TRITON_INTERPRET must be unset", file=sys.stderr)
        return 2

    print(f"{'op':28} {'kernel':28} chip  registers  spills  shared")
    wrong = 0
    for row in compile_all(options.ops, options.chips):
        bad = not row.passes(options.spills)
        wrong += bad
        facts = row.error or f"{row.registers:9}  {row.spills:6}  {row.shared:6}"
        print(
            f"{row.op:28} {row.kernel:28} {row.chip:4}  {facts}{'  !' if bad else ''}", flush=True
        )
    print(f"{wrong} of these kernels fail or spill more than {options.spills} bytes a thread")
    return int(wrong > 0)


def compile_all(ops: Sequence[str] = (), chips: Sequence[int] = CHIPS) -> Iterator[Compiled]:
    """Compile on every core; the order is that of the specs."""
    chosen = [spec for spec in specs() if not ops or spec.name in ops]
    work = [
        (spec.name, i, chip)
        for spec in chosen
        for i, kernel in enumerate(spec.kernels())
        for chip in chips
        if chip in (kernel.chips or chips)
    ]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield from pool.map(_compile, *zip(*work, strict=True), chunksize=len(chips))


def _compile(op: str, index: int, chip: int) -> Compiled:
    kernel = next(spec for spec in specs() if spec.name == op).kernels()[index]
    # Kernels for float64 are there to be proved, not to be fast.
    matters = "*fp64" not in kernel.signature.values()
    try:
        return Compiled(op, kernel.id, chip, *_costs(kernel, chip), matters=matters)
    except Exception as error:
        first_line = f"{type(error).__name__}: {error}".splitlines()[0]
        return Compiled(op, kernel.id, chip, error=first_line)


def _costs(kernel: Compilation, chip: int) -> tuple[int, int, int]:
    """Registers and spilled bytes of a thread, shared memory of a program."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, any_number = kernel.kernel.arg_names, kernel.kernel.do_not_specialize
    aligned = {
        (names.index(n),): [["tt.divisibility", 16]]
        for n, t in kernel.signature.items()
        if t.startswith(("*", "i")) and n not in any_number
    }
    signature = dict(kernel.signature) | dict.fromkeys(kernel.constants, "constexpr")
    source = ASTSource(kernel.kernel, signature, dict(kernel.constants), aligned)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", chip, 32),
        options=OPTIONS | {n: getattr(kernel, n) for n in ("num_warps", "num_stages", "maxnreg")},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{w}:(\d+)", usage)[1]) for w in ("REG", "STACK"))  # type: ignore[index]
    return registers, stack, compiled.metadata.shared


if __name__ == "__main__":
    sys.exit(main())
