"""FlexAttention's mask over packed rows: milliseconds to build, tiles, compilations, and on CUDA the kernel.

Rows are packed trajectories of log-normal length (mean 2,000, limit 8,192) with random step maps at the
given tokens per forward. Tiles are 128 x 128. A partial tile asks the rule for every element, a full one
does not, an empty one is never visited; `visited` is relative to all tiles of the row.

    python benchmarks/attention.py                    # 32k tokens per row
    python benchmarks/attention.py tokens=8192 rows=3
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from layout import random_trajectory

import model as sdar
from masking import TILE, Packed, block_mask, pack, padded, replay

HEADS, KV_HEADS, DIM = 32, 8, 128  # SDAR-8B


def packed_rows(tokens: int, rows: int, tpf: int = 2, mean: int = 2000, limit: int = 8192) -> list[Packed]:
    """`rows` packed rows of about `tokens` tokens each."""
    rng, lengths, total = random.Random(0), [], 0
    while total < rows * tokens:
        length = min(limit, max(64, int(rng.lognormvariate(np.log(mean) - 0.32, 0.8)))) // 4 * 4
        lengths.append(length)
        total += length * (1 + 4 / tpf / 4 * 2)
    views = [replay(random_trajectory(128, n, tpf, 4, 1000), 4, weight=1.0) for n in lengths]
    return [padded(row) for row in pack(views, 4, 0, tokens)][:rows]


def tile_counts(packed: Packed, tile: int = TILE) -> dict[str, float]:
    """Tiles of a row: all, visited and partial, listed although empty; from what BlockMask lists.

    Whether a listed tile is empty is found by asking the rule for its elements, query tile by query tile.
    """
    mask, n = block_mask(packed, tile), len(packed)
    i = torch.arange(n, device=packed.ids.device)
    partial, full, empty = (int(mask.kv_num_blocks.sum()), int(mask.full_kv_num_blocks.sum()), 0)
    for query, count in enumerate(mask.kv_num_blocks[0, 0].tolist()):
        queries = i[query * tile : (query + 1) * tile]
        keys = (mask.kv_indices[0, 0, query, :count, None] * tile + i[:tile]).clamp(
            max=n - 1
        )  # [count, tile]
        seen = mask.mask_mod(0, 0, queries[:, None, None], keys[None])
        empty += count - int(seen.any(0).any(-1).sum())
    return {"all": mask.kv_indices.shape[-1] ** 2, "full": full, "partial": partial, "empty": empty}


def milliseconds(run, device: str, repeats: int = 10) -> float:
    """Median of `repeats` runs after two warm-ups."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def random_inputs(packed: Packed, dtype: torch.dtype, dim: int = DIM) -> list[torch.Tensor]:
    """Random query, key and value [1, heads, N, dim] of one layer's attention, with the heads of SDAR-8B."""
    shapes = [(1, heads, len(packed), dim) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(s, device=packed.ids.device, dtype=dtype, requires_grad=True) for s in shapes]


def attend_milliseconds(row: sdar.FlexRow, inputs: list[torch.Tensor]) -> float:
    """Forward and backward of one layer's attention over a row, with `random_inputs`."""
    scaling, device = inputs[0].shape[-1] ** -0.5, inputs[0].device.type
    return milliseconds(lambda: row.attend(0, *inputs, scaling).sum().backward(), device)


def main(arguments: list[str]) -> None:
    """Print the table."""
    sizes = {"tokens": 32768, "rows": 4} | {k: int(v) for k, _, v in (a.partition("=") for a in arguments)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    head = ["tokens", "sequences", "mask ms", "visited", "partial of visited", "empty of visited"]
    head += ["compilations so far", "flex ms (forward + backward)"]
    print("|", " | ".join(head), "|")
    print("|---" * len(head) + "|")
    for row in packed_rows(**sizes):
        row = row.to(device)
        build = milliseconds(lambda row=row: block_mask(row), device)
        tiles = tile_counts(row)
        visited = tiles["full"] + tiles["partial"]
        flex = "-"
        if device == "cuda":
            flex = f"{attend_milliseconds(sdar.FlexRow(row), random_inputs(row, torch.bfloat16)):.2f}"
        cells = [
            f"{len(row):,}",
            str(1 + int(row.sequence[row.scored].max())),  # without the one that pads
            f"{build:.2f}",
            f"{visited / tiles['all']:.1%}",
        ]
        cells += [f"{tiles['partial'] / visited:.1%}", f"{tiles['empty'] / visited:.1%}"]
        cells += [str(torch._dynamo.utils.counters["stats"]["unique_graphs"]), flex]
        print("|", " | ".join(cells), "|")
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{where}, torch {torch.__version__}, block size 4, tiles of {TILE}")


if __name__ == "__main__":
    main(sys.argv[1:])
