"""How rows of a product are shared out among programs."""

import pytest

from pallas_kernels.transposed import MAX_ROWS, Config, grid, row_parts


@pytest.mark.parametrize(("rows", "block_m", "parts"), [
    (1, 64, (8,)), (24, 64, (32,)), (60, 64, (64,)), (64, 64, (64,)), (70, 64, (64,)), (90, 128, (64, 32)), (96, 128, (64, 32)),
    (97, 128, (128,)), (192, 256, (128, 64)), (192, 128, (64, 32)), (384, 256, (128, 64)), (512, 256, (256,)),
    (130, 128, (64, 32)),
])
def test_rows_of_a_program(rows, block_m, parts):
    assert row_parts(rows, Config(block_m=block_m)) == parts


@pytest.mark.parametrize("block_m", [16, 64, 128, 256])
def test_programs_hold_all_rows_and_none_is_empty(block_m):
    config = Config(block_m=block_m)
    for rows in range(1, MAX_ROWS + 1):
        programs, each = grid(rows, 64, config, shares=1)[0], sum(row_parts(rows, config))
        assert (programs - 1) * each < rows <= programs * each
        assert each <= max(block_m, 8)
