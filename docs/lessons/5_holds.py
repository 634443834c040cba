"""Lesson 5 of docs/afternoon.md: every trajectory of a block of two tokens, and what each is worth."""

from __future__ import annotations

import math
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from masking import Trajectory, pack, replay  # noqa: E402
from model import score_logits  # noqa: E402
from plumbing.common import run_script  # noqa: E402
from rollout import Decoding, hold_bound, reveal  # noqa: E402

TAU = 0.6
HOW = Decoding(rule="dynamic", threshold=TAU)
MASK = 2  # the tokens are a = 0 and b = 1

# The model: by what the block shows, the probabilities of a and b at either position.
MODEL = {
    (MASK, MASK): ((0.7, 0.3), (0.65, 0.35)),
    (0, MASK): ((1, 0), (0.8, 0.2)),
    (1, MASK): ((0, 1), (0.4, 0.6)),
    (MASK, 0): ((0.5, 0.5), (1, 0)),
    (MASK, 1): ((0.9, 0.1), (0, 1)),
}


def enumerate_block() -> dict[tuple, tuple[float, list[list[float]]]]:
    """Every trajectory: by (tokens, steps) its probability, and of each token the bounds of its holds."""
    found: dict[tuple, tuple[float, list[list[float]]]] = {}

    def walk(state, steps, bounds, step, probability) -> None:
        masked = torch.tensor([token == MASK for token in state])
        if not masked.any():
            before, _ = found.get((state, steps), (0.0, None))
            found[state, steps] = (before + probability, bounds)
            return
        # All draws at all masked positions; a known position "draws" what it is.
        choices = [range(2) if hidden else (token,) for token, hidden in zip(state, masked, strict=True)]
        for draw in product(*choices):
            p = [MODEL[state][j][v] for j, v in enumerate(draw)]
            confidence = torch.tensor([math.log(c) for c in p])
            shown = reveal(confidence, masked, HOW).tolist()
            bound = hold_bound(confidence, torch.tensor(shown), HOW).tolist()
            new, when, holds = list(state), list(steps), [list(b) for b in bounds]
            for j in range(2):
                if shown[j]:
                    new[j], when[j] = draw[j], step
                elif state[j] == MASK:
                    holds[j].append(bound[j])
            walk(tuple(new), tuple(when), holds, step + 1, probability * math.prod(p))

    walk((MASK, MASK), (0, 0), [[], []], 1, 1.0)
    return found


def likelihood(tokens, steps, bounds, exact: bool) -> tuple[float, list[float]]:
    """By replay and score_logits, as in training: of a trajectory, and of each of its holds."""
    trajectory = Trajectory([], list(tokens), list(steps), [0.0] * 2)
    trajectory.hold_bounds, trajectory.hold_logprobs = bounds, [[0.0] * len(b) for b in bounds]
    (row,) = pack([replay(trajectory, 2, weight=1.0, exact=exact)], 2, MASK, token_budget=99)
    states = row.ids.view(-1, 2).tolist()
    logits = [MODEL[tuple(states[i // 2])][i % 2] for i in row.scored.tolist()]
    logprobs = score_logits(torch.tensor(logits).log(), row.targets, row.bounds, HOW).logprobs
    return logprobs.sum().exp().item(), logprobs[row.targets < 0].exp().tolist()


def main() -> None:
    """Print the trajectories, and their sums."""
    sums = [0.0, 0.0, 0.0]
    print("tokens  steps   probability   reveals   reveals and holds   mass of the hold")
    for (tokens, steps), (probability, bounds) in sorted(enumerate_block().items()):
        reveals, _ = likelihood(tokens, steps, bounds, exact=False)
        exact, masses = likelihood(tokens, steps, bounds, exact=True)
        name = "".join("ab"[token] for token in tokens)
        holds = " ".join(f"{mass:.3f}" for mass in masses) or "-"
        line = f"{name}      {steps[0]} {steps[1]}     {probability:.4f}        {reveals:.4f}    {exact:.4f}"
        print(f"{line}              {holds}")
        sums = [total + value for total, value in zip(sums, (probability, reveals, exact), strict=True)]
    print(f"sum             {sums[0]:.4f}        {sums[1]:.4f}    {sums[2]:.4f}")


if __name__ == "__main__":
    run_script(main)
