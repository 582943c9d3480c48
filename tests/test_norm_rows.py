"""How the kernels of the norms divide rows and columns."""

import pytest

from liger_fn.functional.norm import gated_rms_norm, poly_norm, rows


@pytest.mark.parametrize("start", range(1, 40000, 1000))
def test_blocks_cover_a_row_and_little_more(start):
    for D in range(start, start + 1000):
        block_d, pieces = rows.cover(D)
        assert block_d & (block_d - 1) == 0
        assert block_d * (pieces - 1) < D <= block_d * pieces
        if D > 512:
            assert 4 * block_d * pieces <= 5 * D
            assert pieces <= 7


@pytest.mark.parametrize("D", [1, 64, 128, 1152, 2048, 4096, 5376, 8192, 16384, 32768, 10**6])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("centred", [False, True])
def test_a_program_holds_whole_rows_in_registers_or_loops(D, itemsize, centred):
    for config in (rows._fwd_config(D, itemsize, centred), rows._bwd_config(D, itemsize, centred)):
        threads = 32 * config["num_warps"]
        assert threads <= 1024
        tile = config["BLOCK_D"] * config.get("BLOCK_N", 1) * config.get("PIECES", 1)
        # Of the 64 registers that each of 1024 threads has, half may hold one row; where a program
        # has fewer threads, each may have some more.
        assert tile <= (32 if threads == 1024 else 40) * threads
        if "PIECES" in config:
            assert config["BLOCK_D"] * config["PIECES"] >= D


@pytest.mark.parametrize("D", [1, 64, 128, 1152, 2048, 2880, 4096, 5376, 8192, 8193, 16384, 32768])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_so_do_those_of_norms_with_more_inputs(D, itemsize):
    backward = [
        (3, gated_rms_norm._gated_rms_norm_bwd_config(D, itemsize, gate_first))
        for gate_first in (False, True)
    ]
    backward.append((2, poly_norm._poly_norm_bwd_config(D, itemsize)))
    forward = [
        gated_rms_norm._gated_rms_norm_fwd_config(D, itemsize),
        poly_norm._poly_norm_fwd_config(D, itemsize),
    ]
    for config in (*forward, *(config for _, config in backward)):
        width = config["BLOCK_D"] * config.get("PIECES", 1)
        assert config["BLOCK_N"] * width <= 32 * 32 * config["num_warps"]
        if "PIECES" in config:
            assert D <= width <= max(512, 1.25 * D)
    for inputs, config in backward:
        if "PIECES" in config:
            tile = config["BLOCK_N"] * config["BLOCK_D"] * config["PIECES"]
            ahead = inputs * tile * itemsize * (config["STAGES"] - 1)
            # What is on its way lies in shared memory, of which small chips have 99 KiB.
            assert ahead <= 96 * 1024


@pytest.mark.parametrize("N", [1, 2, 31, 500, 8192, 65536, 10**7])
@pytest.mark.parametrize("block_n", [1, 4, 32])
@pytest.mark.parametrize("most", [1, 4, 132, 528])
def test_strips_hold_every_row_once(N, block_n, most):
    programs, strip = rows.strips_of(N, block_n, most)
    assert 1 <= programs <= most
    assert strip % block_n == 0
    assert strip * (programs - 1) < N <= strip * programs
