"""What kernels share."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Triton reads a kernel from a file, and compiles it in a process that does not interpret.
ROW_SUMS = """
import sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from liger_fn.functional.core.direct import OPTIONS
from liger_fn.functional.core.kernels import times

@triton.jit
def kernel(a_ptr, b_ptr, sum_ptr, UP_TO: tl.constexpr, D: tl.constexpr):
    row, col = tl.arange(0, 8), tl.arange(0, D)
    at = row[:, None] * D + col[None, :]
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    tl.store(sum_ptr + row, tl.sum(times(a, b, UP_TO), axis=1))

pointers = dict.fromkeys(("a_ptr", "b_ptr", "sum_ptr"), "*fp32")
D = int(sys.argv[1])
for up_to in (D - 1, D, None):
    constants = {"UP_TO": up_to, "D": D}
    source = ASTSource(kernel, pointers | dict.fromkeys(constants, "constexpr"), constants, {})
    options = OPTIONS | {"num_warps": max(1, D // 32)}
    print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
    print("//// next")
"""


@pytest.mark.parametrize("D", [8, 32, 64])
def test_no_lane_fuses_its_product_with_that_of_another(D, tmp_path):
    """Each would round the other's alone, and lanes would hold sums that differ."""
    script = tmp_path / "row_sums.py"
    script.write_text(ROW_SUMS)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)

    command = [sys.executable, str(script), str(D)]
    run = {"env": environment, "capture_output": True, "text": True, "timeout": 300}
    printed = subprocess.run(command, **run, check=True).stdout

    def fused(ptx: str) -> list[str]:
        from_other_lanes = re.findall(r"shfl\.sync\.bfly\.b32\s+(%\w+)", ptx)
        assert from_other_lanes
        return [r for r in from_other_lanes if re.search(rf"fma\.rn\.f32.*, {r};", ptx)]

    narrower, as_wide, any_width = printed.split("//// next\n")[:-1]
    assert fused(narrower)
    assert not fused(as_wide)
    assert not fused(any_width)
