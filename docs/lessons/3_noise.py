"""Lesson 3 of docs/afternoon.md: noised copies of a training text, and what their weights are for."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402

from masking import Views, noise  # noqa: E402
from plumbing.common import run_script  # noqa: E402

TEXT, PROMPT, BLOCK = "3+8?3+8=11 {11}.", 4, 4  # the first four characters are the question
COPIES, PAIRS = 1, False  # K; whether copies come in pairs that mask each other's complement
DRAWS = 4000


def draw(number: int) -> Views:
    """The views of noised copies of the text; the number seeds the noise."""
    ids, rng = list(map(ord, TEXT)), np.random.default_rng(number)
    return noise(ids, PROMPT, BLOCK, rng, views=COPIES, complementary=PAIRS)


def main() -> None:
    """Print the views of a few draws, then means over many."""
    print(f"clean    {TEXT}")
    for number in range(3):
        views = draw(number)
        shown = []
        for block, masked, weights in zip(views.block, views.masked, views.weights, strict=True):
            letters = TEXT[block * BLOCK : (block + 1) * BLOCK]
            noisy = "".join("_" if hidden else letter for letter, hidden in zip(letters, masked, strict=True))
            shown.append(f"{block}: {noisy} x{weights[0]:.2f}")
        print(f"draw {number}   {'   '.join(shown)}")

    # Per response token: how often it is scored, and the sum of its weights 1 / (t K).
    response, scored, weighed = len(TEXT) - PROMPT, [], []
    for number in range(DRAWS):
        views = draw(number)
        scored.append(views.is_scored.sum() / response)
        weighed.append(views.weights[views.is_scored].sum() / response)
    print(f"\n{DRAWS} draws, per response token: mean, standard deviation")
    print(f"times scored     {np.mean(scored):.3f}  {np.std(scored):.3f}")
    print(f"sum of weights   {np.mean(weighed):.3f}  {np.std(weighed):.3f}")


if __name__ == "__main__":
    run_script(main)
