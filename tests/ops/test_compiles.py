"""All GPU kernels compile for Hopper, on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

KERNELS = {
    "dense/hopper": "_dense_kernel", "dense/triton": "_dense_kernel",
    "dense/hopper_rows": "_rows_kernel", "dense/hopper_decode_kernel": "decode_kernel",
    "sparse/hopper": "_sparse_kernel", "sparse/triton": "_tile_kernel",
    "sparse/triton_unaligned": "_window_kernel _paper_kernel",
    "sparse/layout": "_index_kernel _plan_kernel _gather_columns_kernel _gather_means_kernel "
                     "_list_kernel",
    "select/hopper_tiles": "_mass_kernel", "select/hopper_scouts": "_scout_kernel",
    "select/triton_tiles": "rotate_probes rotate_listed tile_masses combine_logs diagonal_masses "
                           "free_masses",
    "select/triton_recall": "sum_masses",
    "select/scout_kernels": "sum_queries mean_differences score_scouts score_columns score_windows "
                            "list_tiles",
    "select/triton_keys": "find_blocks tile_columns key_masses",
    "select/top_k": "choose_windows write_largest place_columns group_maxima lower_bounds "
                    "count_reached list_reached place_diagonals",
    "tiles/splits": "_merge_kernel", "tiles/items": "merge_items merge_shares",
    "tiles/rotary": "_rotate_kernel",
    "moe/hopper": "_list_tiles", "moe/hopper_product": "product_kernel",
    "moe/triton": "_expert_up _expert_down _combine",
    "moe/triton_routing": "_route _count _tally _put",
    "quant/triton_rows": "_quantize_rows _round_rows _norm_rows",
    "quant/triton_few": "_few_fp8 _few_int4",
    "quant/triton_dense": "_dense_fp8 _dense_int4",
    "block_rows": "_move_rows", "decode": "_attend_items",
    "quant/triton_kv": "_store_quantised _quantised_means _write_out",
    "pointwise": "_rms_norm _silu_mul _store_rotated _block_means"}


def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    """Down to machine code, by way of the host code that launches them. Interpreted kernels show
    what is computed, not that a compiler takes it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.compile_for_hopper"], capture_output=True, text=True,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)}, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = {line.split()[0] for line in done.stdout.splitlines()}
    assert compiled == {name for names in KERNELS.values() for name in names.split()}
