"""The packed layout against the published one: forward tokens, seconds, and the same numbers.

To score a trajectory, DiRL (arXiv 2512.22234) and TraceRL (2509.06949) run the network once per
*round* on [noisy | clean], 2L tokens. Round r shows, in every block at once, what the decoder saw
in the r-th denoising step of that block: up to B rounds, here padded to B (a rank that ran fewer
passes than the others would keep them waiting). masking.py lays the clean tokens out once, with
only the views that happened.

Measured, with the same network and weights on both sides:

    forward tokens of a long trajectory (prompt 1024, response 8192), counted
    on the CPU, prompt 126 and response 898: tokens, seconds of a training step (forward and
    backward; median of 3 after a warm-up, the sides alternating), log-probabilities, gradients

The rounds are timed twice: with one dense 2L x 2L mask, the plain way on a CPU, and with the packed
pass's own attention (`JointRow`), so that what the layout saves is told apart from what the
attention saves. The packed pass projects the revealed rows onto the vocabulary, the rounds every
masked row, as the published code does. Left out: padding to the longest allowed response, which
the published code does as well.

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

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import model as sdar
from masking import Packed, pack, replay
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
    """One pass over a sequence of L tokens, N = 2L: the clean half, then the noisy half.

    The order of the halves means nothing to the mask; `JointRow` wants the clean one first.
    """

    ids: torch.Tensor  # [N]
    positions: torch.Tensor  # [N]
    sequence: torch.Tensor  # [N] all 0
    block: torch.Tensor  # [N]
    view: torch.Tensor  # [N] 0 = clean, 1 + block in the noisy half
    masked: torch.Tensor  # [M] positions that are masked: the rows that the LM head projects
    revealed: torch.Tensor  # [M] which of them are revealed in this round
    block_size: int


def random_trajectory(prompt: int, response: int, tpf: int, block_size: int, vocabulary: int) -> Rollout:
    """A rollout that reveals `tpf` tokens a step while the block has as many, in random order."""
    rng = random.Random(0)
    length, steps, step = prompt + response, {}, 0
    for start in range(prompt // block_size * block_size, length, block_size):
        left = [i for i in range(start, start + block_size) if i >= prompt]
        rng.shuffle(left)
        while left:
            step += 1
            for _ in range(min(len(left), tpf)):
                steps[left.pop()] = step
    ids = [rng.randrange(vocabulary) for _ in range(length)]
    rollout = Rollout.of(ids[:prompt], ids[prompt:])
    rollout.steps = [steps[i] for i in range(prompt, length)]
    return rollout


def rounds(rollout: Rollout, block_size: int, mask_id: int, pad_to_block_size: bool = False) -> list[Round]:
    """The published layout: a pass per round, until no block has a step left.

    `pad_to_block_size` adds passes that score nothing, up to block_size of them.
    """
    ids = torch.tensor(rollout.prompt_ids + rollout.response_ids)
    steps = torch.tensor([0] * len(rollout.prompt_ids) + rollout.steps).view(-1, block_size)
    # rank: in which of its block's steps a token was revealed, from 1; 0 in the prompt
    earlier = [[{int(t) for t in row if 0 < t < s} for s in row] for row in steps]
    rank = torch.tensor([[len(e) for e in row] for row in earlier])
    rank = torch.where(steps > 0, rank + 1, 0).flatten()
    positions = torch.arange(len(ids))
    block = positions // block_size
    passes = []
    for number in range(1, (block_size if pad_to_block_size else int(rank.max())) + 1):
        # a block that is finished by now is shown clean in the noisy half, and not scored
        masked = (rank >= number).nonzero()[:, 0]
        passes.append(
            Round(
                ids=torch.cat([ids, ids.index_fill(0, masked, mask_id)]),
                positions=positions.repeat(2),
                sequence=torch.zeros(2 * len(ids), dtype=torch.long),
                block=block.repeat(2),
                view=torch.cat([torch.zeros_like(block), 1 + block]),
                masked=masked,
                revealed=rank[masked] == number,
                block_size=block_size,
            )
        )
    return passes


def score_rounds(
    model: sdar.BlockDiffusion,
    rollout: Rollout,
    block_size: int,
    mask_id: int,
    pad_to_block_size: bool = False,
    attention: str = "dense",
) -> tuple[torch.Tensor, int]:
    """Log-probability of every response token at its reveal [R], and the tokens forwarded."""
    ids = torch.tensor(rollout.prompt_ids + rollout.response_ids)
    logprobs, tokens = torch.zeros(len(ids)), 0
    for one in rounds(rollout, block_size, mask_id, pad_to_block_size):
        hidden = model.model(
            input_ids=one.ids[None],
            position_ids=one.positions[None],
            use_cache=False,
            visible=sdar.attention_over(one, attention),
        ).last_hidden_state[0]
        log_p = model.lm_head(hidden[len(ids) + one.masked]).float().log_softmax(-1)  # [M, V]
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


def compare(prompt: int, response: int, tpf: int, block_size: int = 4, repeats: int = 3) -> dict[str, dict]:
    """The packed pass against the rounds (by their attention) on a small random model."""
    with tempfile.TemporaryDirectory() as folder:
        sdar.tiny(folder, block_size=block_size, initializer_range=PEAKED, **SIZES)
        model, mask_id = sdar.load(folder), sdar.load_tokenizer(folder).mask_token_id
    rollout = random_trajectory(prompt, response, tpf, block_size, vocabulary=256)
    sides = {
        "packed": lambda: score_packed(model, rollout, block_size, mask_id),
        "dense": lambda: score_rounds(model, rollout, block_size, mask_id, True, "dense"),
        "joint": lambda: score_rounds(model, rollout, block_size, mask_id, True, "joint"),
    }
    runs = {side: [] for side in sides}
    for _ in range(1 + repeats):  # the first is the warm-up
        for side, score in sides.items():
            runs[side].append(training_step(model, score))
    logprobs, tokens, gradient, _ = runs["packed"][0]
    seconds = {side: statistics.median(r[3] for r in runs[side][1:]) for side in sides}
    return {
        side: {
            "tpf": rollout.tokens_per_forward,
            "tokens": (runs[side][0][1], tokens),
            "seconds": (seconds[side], seconds["packed"]),
            "logprobs": float((logprobs - runs[side][0][0]).abs().max()),
            "gradients": float((gradient - runs[side][0][2]).norm() / runs[side][0][2].norm()),
        }
        for side in ("dense", "joint")
    }


def main() -> None:
    """Print the table."""
    head = ["prompt + response", "TPF", "attention of the rounds", "tokens: rounds", "packed"]
    head += ["ratio", "seconds: rounds", "packed", "ratio", "max log-prob diff", "gradient diff"]
    print("|", " | ".join(head), "|")
    print("|---" * len(head) + "|")
    for tpf in (1, 2):
        rollout = random_trajectory(1024, 8192, tpf, 4, vocabulary=256)
        packed, published = count_tokens(rollout, 4)
        cells = ["1024 + 8192", f"{rollout.tokens_per_forward:.2f}", "-", f"{published:,}"]
        cells += [f"{packed:,}", f"{published / packed:.2f}"] + ["-"] * 5
        print("|", " | ".join(cells), "|")
    for attention, row in compare(126, 898, tpf=2).items():
        cells = ["126 + 898", f"{row['tpf']:.2f}", attention]
        for name, form in (("tokens", ","), ("seconds", ".2f")):
            published, packed = row[name]
            cells += [f"{published:{form}}", f"{packed:{form}}", f"{published / packed:.2f}"]
        cells += [f"{row['logprobs']:.1e}", f"{row['gradients']:.1e}"]
        print("|", " | ".join(cells), "|")
    print(f"\nCPU, float32, {torch.get_num_threads()} threads, block size 4, {SIZES}")
    print("Log-probability difference in nats; gradient difference relative, over all parameters.")


if __name__ == "__main__":
    main()
