"""Lesson 1 of docs/afternoon.md: six known tokens, and the last block once more, masked."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from masking import visible  # noqa: E402
from plumbing.common import run_script  # noqa: E402

TEXT = "abcdef"
BLOCK = 2  # tokens of a block (B)


def main() -> None:
    """Print who sees whom: a row per token that looks, a column per token that is looked at."""
    # The clean copy is view 0; view 1 is its last block, all of it still masked.
    last = range(len(TEXT) - BLOCK, len(TEXT))
    names = [*TEXT, *"_" * BLOCK]
    block = torch.tensor([i // BLOCK for i in [*range(len(TEXT)), *last]])
    view = torch.tensor([0] * len(TEXT) + [1] * BLOCK)

    seen = visible(0, block[:, None], view[:, None], 0, block[None], view[None])
    print("  ", *names)
    for name, row, b, v in zip(names, seen, block.tolist(), view.tolist(), strict=True):
        what = "view" if v else "clean"
        print(name, "", *("#" if sees else "." for sees in row), f"  block {b}, {what}")
    print(f"\n{int(seen.sum())} pairs of {seen.numel()}, blocks of {BLOCK}")


if __name__ == "__main__":
    run_script(main)
