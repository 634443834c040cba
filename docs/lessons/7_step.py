"""Lesson 7 of docs/afternoon.md: DiPO by hand. One masked position, three tokens, four rollouts."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from dipo import DiPOConfig, dipo_loss, group_advantages  # noqa: E402
from masking import Trajectory, pack, replay  # noqa: E402
from model import Sampling, score_logits  # noqa: E402
from plumbing.common import run_script  # noqa: E402

SAMPLED_FROM = (0.5, 0.3, 0.2)  # probabilities of a, b and c where the rollouts were drawn
TRAINED = (0.5, 0.3, 0.2)  # and where they are scored: the policy before its first update
DRAWS = "abbc"  # what the four rollouts revealed; b is right
RATE = 1.0  # of plain gradient descent
UPDATES = 2


def main() -> None:
    """Print rewards, advantages, then loss and gradient of every update."""
    # Four rollouts of one question: three known tokens of the question open the block, one is drawn.
    config = DiPOConfig(group_size=4, clip_low=0.2, clip_high=0.28)
    rewards = [{"accuracy": float(token == "b")} for token in DRAWS]
    advantages = group_advantages(rewards, [r["accuracy"] for r in rewards], config)
    views = []
    for token, advantage in zip(DRAWS, advantages, strict=True):
        rollout = Trajectory([5, 6, 7], ["abc".index(token)], steps=[1], logprobs=[0.0])
        views.append(replay(rollout, 4, weight=1 / len(DRAWS), advantage=advantage))
    (row,) = pack(views, 4, mask_id=9, token_budget=999)
    print("rollout  reward  advantage")
    for token, reward, advantage in zip(DRAWS, rewards, advantages, strict=True):
        print(f"   {token}       {reward['accuracy']:.0f}       {advantage:+.0f}")

    # The policy is a table of three logits, the same in each of the four views.
    logits = torch.tensor(TRAINED).log().requires_grad_()
    old = None
    for update in range(1, UPDATES + 1):
        scores = score_logits(logits.expand(len(row.scored), 3), row.targets, row.bounds, Sampling())
        old = scores.logprobs.detach() if old is None else old
        loss, sums = dipo_loss(scores.logprobs, old, row.advantages, row.weights, config)
        (gradient,) = torch.autograd.grad(loss, logits)
        ratios = (scores.logprobs.detach() - old).exp()
        print(f"\nupdate {update}    p(a) p(b) p(c)  {in_line(logits.detach().softmax(-1))}")
        print(f"  ratios of the rollouts  {in_line(ratios)}   clipped: {int(sums['clipped'])}")
        print(f"  loss {in_line(loss[None], '+')}      gradient  {in_line(gradient, '+')}")
        logits = (logits.detach() - RATE * gradient).requires_grad_()
    print(f"\nafter them  p(a) p(b) p(c)  {in_line(logits.detach().softmax(-1))}")

    # If every answer were worth the same, 1, there would be nothing to learn, and the mean over draws of
    # reward times gradient of log p would be 0. Is it?
    logits = torch.tensor(TRAINED).log().requires_grad_()
    mean = (torch.tensor(SAMPLED_FROM) * logits.log_softmax(-1)).sum()
    print(f"push without anything to learn  {in_line(torch.autograd.grad(mean, logits)[0], '+')}")


def in_line(numbers: torch.Tensor, sign: str = "") -> str:
    """Three digits of each; no -0.000."""
    return " ".join(f"{round(x, 3) + 0.0:{sign}.3f}" for x in numbers.tolist())


if __name__ == "__main__":
    run_script(main)
