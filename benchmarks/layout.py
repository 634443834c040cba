"""The packed layout against the published one: forward tokens, seconds, and the same numbers.

To score a trajectory, DiRL (arXiv 2512.22234) and TraceRL (2509.06949) run the network once per
*round* on [noisy | clean], 2L tokens. Round r shows, in every block at once, what the decoder saw in
the r-th denoising step of that block; so there are up to B rounds, and since every rank must run as
many, always B. masking.py lays the clean tokens out once, with only the views that happened.

Measured here, with the same network and weights on both sides:

    forward tokens of a long trajectory (prompt 1024, response 8192), counted
    on the CPU, prompt 126, response 898: tokens, seconds of a training step (forward and
    backward; median of 3 after a warm-up, the two sides alternating), log-probabilities, gradients

Both sides project onto the vocabulary only what they need: the packed pass the revealed rows, the
rounds every masked row, as the published code does. Each side uses its own attention on the CPU: the
rounds one dense 2L x 2L mask, the packed pass `JointRow`. Left out: padding to the longest allowed
response, which the published code does as well and which depends on the data.

    python benchmarks/layout.py
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import model as sdar
from masking import Packed, pack, replay, visible
from rollout import Rollout

if TYPE_CHECKING:
    from collections.abc import Callable

PEAKED = 0.1  # initializer_range: distributions that are not flat, so that an error shows
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4096,
}


class Round(NamedTuple):
    """One [noisy | clean] pass over a sequence of L tokens: N = 2L."""

    ids: torch.Tensor  # [N]
    positions: torch.Tensor  # [N]
    sequence: torch.Tensor  # [N] all 0
    block: torch.Tensor  # [N]
    view: torch.Tensor  # [N] 0 = clean, 1 + block in the noisy half
    masked: torch.Tensor  # [M] positions that are masked: the rows that the LM head projects
    revealed: torch.Tensor  # [M] which of them are revealed in this round


def random_trajectory(prompt: int, response: int, tpf: float, block_size: int, vocabulary: int):
    """A rollout that reveals `tpf` tokens a step (1 or 2, or any whole number), in random order."""
    rng = random.Random(0)
    length, steps, step = prompt + response, {}, 0
    for start in range(prompt // block_size * block_size, length, block_size):
        left = [i for i in range(start, start + block_size) if i >= prompt]
        rng.shuffle(left)
        while left:
            step += 1
            for _ in range(min(len(left), int(tpf))):
                steps[left.pop()] = step
    ids = [rng.randrange(vocabulary) for _ in range(length)]
    rollout = Rollout.of(ids[:prompt], ids[prompt:])
    rollout.steps = [steps[i] for i in range(prompt, length)]
    return rollout


def rounds(
    rollout: Rollout, block_size: int, mask_id: int, pad_to_block_size: bool = False
) -> list[Round]:
    """The published layout: a pass per round, until no block has a step left.

    `pad_to_block_size` adds passes that score nothing, up to block_size of them.
    """
    ids = torch.tensor(rollout.prompt_ids + rollout.response_ids)
    steps = torch.tensor([0] * len(rollout.prompt_ids) + rollout.steps).view(-1, block_size)
    # rank[i]: token i was revealed in the rank-th step of its block, from 1; 0 in the prompt
    rank = torch.stack([torch.unique(s, return_inverse=True)[1] for s in steps])
    rank = rank + ((steps > 0).all(1, keepdim=True)).long()  # a block without prompt has no step 0
    rank = torch.where(steps > 0, rank, 0).flatten()
    positions = torch.arange(len(ids))
    block = positions // block_size
    passes = []
    for number in range(1, (block_size if pad_to_block_size else int(rank.max())) + 1):
        # a block that is finished by now is shown clean in the noisy half, and not scored
        masked = (rank >= number).nonzero()[:, 0]
        passes.append(
            Round(
                ids=torch.cat([ids.index_fill(0, masked, mask_id), ids]),
                positions=positions.repeat(2),
                sequence=torch.zeros(2 * len(ids), dtype=torch.long),
                block=block.repeat(2),
                view=torch.cat([1 + block, torch.zeros_like(block)]),
                masked=masked,
                revealed=rank[masked] == number,
            )
        )
    return passes


class DenseRound:
    """SDPA under one 2L x 2L mask, by the rule that the packed layout has as well."""

    def __init__(self, one: Round):
        tags = (one.sequence, one.block, one.view)
        self.mask = visible(*(t[:, None] for t in tags), *(t[None] for t in tags))

    attend = sdar.DenseRow.attend


def score_rounds(
    model: sdar.BlockDiffusion,
    rollout: Rollout,
    block_size: int,
    mask_id: int,
    pad_to_block_size: bool = False,
) -> tuple[torch.Tensor, int]:
    """Log-probability of every response token at its reveal [R], and the tokens forwarded."""
    ids = torch.tensor(rollout.prompt_ids + rollout.response_ids)
    logprobs, tokens = torch.zeros(len(ids)), 0
    for one in rounds(rollout, block_size, mask_id, pad_to_block_size):
        hidden = model.model(
            input_ids=one.ids[None],
            position_ids=one.positions[None],
            use_cache=False,
            visible=DenseRound(one),
        ).last_hidden_state[0]
        log_p = model.lm_head(hidden[one.masked]).float().log_softmax(-1)  # [M, V]
        of_token = log_p.gather(1, ids[one.masked][:, None])[:, 0]
        logprobs = logprobs.index_add(0, one.masked, torch.where(one.revealed, of_token, 0.0))
        tokens += len(one.ids)
    return logprobs[len(rollout.prompt_ids) :], tokens


def packed_row(rollout: Rollout, block_size: int, mask_id: int) -> Packed:
    """The trajectory alone in a row of the packed layout."""
    views = replay(rollout, block_size, weight=1.0)
    return pack([views], block_size, mask_id, token_budget=len(views))[0]


def score_packed(
    model: sdar.BlockDiffusion, rollout: Rollout, block_size: int, mask_id: int
) -> tuple[torch.Tensor, int]:
    """The same as `score_rounds`, by one pass over the packed row."""
    row = packed_row(rollout, block_size, mask_id)
    scores = model.score(row, sdar.Sampling())
    where = row.positions[row.rows] - len(rollout.prompt_ids)
    return torch.zeros(len(rollout.response_ids)).index_put((where,), scores.logprobs), len(row)


def count_tokens(rollout: Rollout, block_size: int) -> tuple[int, int]:
    """Forward tokens: packed, and by B rounds of 2L."""
    length = len(rollout.prompt_ids) + len(rollout.response_ids)
    return len(replay(rollout, block_size, weight=1.0)), block_size * 2 * length


def training_step(
    model: sdar.BlockDiffusion, score: Callable[[], tuple[torch.Tensor, int]]
) -> tuple[torch.Tensor, int, torch.Tensor, float]:
    """Forward and backward: log-probabilities, tokens, gradient as one vector, seconds."""
    model.zero_grad()
    start = time.perf_counter()
    logprobs, tokens = score()
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    seconds = time.perf_counter() - start
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return logprobs.detach(), tokens, gradient, seconds


def compare(prompt: int, response: int, tpf: float, block_size: int = 4, repeats: int = 3) -> dict:
    """Both layouts on a small random model: the figures of one table row."""
    with tempfile.TemporaryDirectory() as folder:
        sdar.tiny(folder, block_size=block_size, initializer_range=PEAKED, **SIZES)
        model, mask_id = sdar.load(folder), sdar.load_tokenizer(folder).mask_token_id
    rollout = random_trajectory(prompt, response, tpf, block_size, vocabulary=256)
    sides = {
        "packed": lambda: score_packed(model, rollout, block_size, mask_id),
        "rounds": lambda: score_rounds(model, rollout, block_size, mask_id, True),
    }
    runs = {side: [] for side in sides}
    for _ in range(1 + repeats):  # the first is the warm-up
        for side, score in sides.items():
            runs[side].append(training_step(model, score))
    packed, published = runs["packed"], runs["rounds"]
    difference = (packed[0][2] - published[0][2]).norm() / published[0][2].norm()
    return {
        "tpf": rollout.tokens_per_forward,
        "tokens": (packed[0][1], published[0][1]),
        "seconds": tuple(statistics.median(r[3] for r in side[1:]) for side in (packed, published)),
        "logprobs": float((packed[0][0] - published[0][0]).abs().max()),
        "gradients": float(difference),
    }


def main() -> None:
    """Print the table."""
    head = ["prompt + response", "TPF", "tokens: published", "packed", "ratio"]
    head += ["seconds: published", "packed", "ratio", "max abs log-prob diff", "rel gradient diff"]
    print("|", " | ".join(head), "|")
    print("|---" * len(head) + "|")
    for tpf in (1, 2):
        rollout = random_trajectory(1024, 8192, tpf, 4, vocabulary=256)
        packed, published = count_tokens(rollout, 4)
        cells = ["1024 + 8192", f"{rollout.tokens_per_forward:.2f}", f"{published:,}"]
        cells += [f"{packed:,}", f"{published / packed:.2f}"] + ["-"] * 5
        print("|", " | ".join(cells), "|")
    row = compare(126, 898, tpf=2)
    cells = ["126 + 898", f"{row['tpf']:.2f}"]
    for name, form in (("tokens", ","), ("seconds", ".2f")):
        packed, published = row[name]
        cells += [f"{published:{form}}", f"{packed:{form}}", f"{published / packed:.2f}"]
    cells += [f"{row['logprobs']:.1e}", f"{row['gradients']:.1e}"]
    print("|", " | ".join(cells), "|")
    print(f"\nCPU, float32, {torch.get_num_threads()} threads, block size 4, {SIZES}")


if __name__ == "__main__":
    main()
