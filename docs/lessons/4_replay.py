"""Lesson 4 of docs/afternoon.md: one packed pass scores every decision as the decoder saw it."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from masking import pack, replay  # noqa: E402
from model import load  # noqa: E402
from plumbing.checkpoint import load_tokenizer, stop_ids, tiny  # noqa: E402
from plumbing.common import run_script  # noqa: E402
from rollout import Decoding, TorchEngine  # noqa: E402

BLOCK = 4
SAMPLED = Decoding(temperature=0.5, threshold=0.6, max_tokens=10)  # how the engine draws
TRAINED = Decoding(temperature=0.5, threshold=0.6, max_tokens=10)  # how the trainer scores


@torch.no_grad()
def main() -> None:
    """Sample a response from a small random model, replay it in one row, compare log-probabilities."""
    with tempfile.TemporaryDirectory() as folder:
        tiny(folder, seed=1, hidden_size=64, num_hidden_layers=2, initializer_range=0.3)  # not near uniform
        model, tokenizer = load(folder), load_tokenizer(folder)
    mask = tokenizer.mask_token_id
    engine = TorchEngine(model, BLOCK, mask, stop_ids(tokenizer))
    (rollout,) = engine.generate([list(b"3+8+5?")], seeds=[4], how=SAMPLED)
    (row,) = pack([replay(rollout, BLOCK, weight=1.0)], BLOCK, mask, token_budget=999)
    packed = model.score(row, TRAINED, backend="dense").logprobs  # dense: by `visible`, pair by pair

    # The row, block by block and view by view. Behind a view: the tokens that it reveals, each with its
    # log-probability as the engine drew it, and as the packed row scores it.
    for start in range(0, len(row), BLOCK):
        ids = " ".join("  _" if i == mask else f"{i:3d}" for i in row.ids[start : start + BLOCK].tolist())
        b, view = int(row.block[start]), int(row.view[start])
        if view == 0:
            print(f"clean   block {b}   {ids}")
            continue
        print(f"view {view:2d} block {b}   {ids}  ", end="")
        for m in ((row.scored >= start) & (row.scored < start + BLOCK)).nonzero()[:, 0].tolist():
            print(f"  {int(row.targets[m])}: {row.engine_logprobs[m]:.3f} {packed[m]:.3f}", end="")
        print()
    gap = (packed - row.engine_logprobs).abs()
    print(f"\nlargest distance between engine and trainer: {gap.max():.3f}")
    clean = len(rollout.prompt_ids) + len(rollout.response_ids)
    print(f"{len(row)} tokens in one row; {BLOCK} passes over [noisy | clean] are {BLOCK * 2 * clean}")


if __name__ == "__main__":
    run_script(main)
