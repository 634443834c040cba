"""The published layout, which the packed one is measured against (train_step.py) and tested against.

To score a trajectory, DiRL (arXiv 2512.22234) and TraceRL (2509.06949) run the network once per
*round* on [noisy | clean], 2L tokens. Round r shows, in every block at once, what the decoder saw
in the r-th denoising step of that block: up to B rounds, in DiRL always B (a rank that ran fewer
passes than the others would keep them waiting), and sequences padded to the longest allowed length.
The LM head projects every masked position, not only the revealed ones.

Also here: the trajectories to measure with.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import model as sdar
from masking import Packed, replay
from plumbing.common import InputError, read_records
from rollout import Rollout


def random_trajectory(
    prompt: int, response: int, tpf: float, block_size: int, vocabulary: int, seed: int = 0
) -> Rollout:
    """A rollout of random tokens with about `tpf` tokens per forward.

    Each block takes 1 + Binomial(B - 1, p) steps, where p makes the mean B / tpf: some blocks are
    revealed at once, and in some every token takes a step, so that all B rounds happen.
    """
    rng = random.Random(seed)
    p = (block_size / tpf - 1) / max(1, block_size - 1)
    length, steps, step = prompt + response, {}, 0
    for start in range(prompt // block_size * block_size, length, block_size):
        left = [i for i in range(start, start + block_size) if i >= prompt]
        rng.shuffle(left)
        count = min(len(left), 1 + sum(rng.random() < p for _ in range(block_size - 1)))
        cuts = [0, *sorted(rng.sample(range(1, len(left)), count - 1)), len(left)]
        for first, last in zip(cuts, cuts[1:], strict=False):
            step += 1
            steps |= dict.fromkeys(left[first:last], step)
    ids = [rng.randrange(vocabulary) for _ in range(length)]
    return _rollout(ids, [steps[i] for i in range(prompt, length)])


def _rollout(ids: list[int], steps: list[int]) -> Rollout:
    """The rollout of prompt and response `ids` in which the tokens of the response had these steps."""
    prompt, n = len(ids) - len(steps), len(steps)
    return Rollout(ids[:prompt], ids[prompt:], steps, [0.0] * n, n, "length")


def log_normal(count: int, limit: int, block_size: int) -> list[int]:
    """`count` lengths up to `limit`, log-normal (sigma 0.8), mean a quarter of it; whole blocks shorter."""
    draws = np.random.default_rng(0).lognormal(0, 0.8, count)
    for _ in range(20):  # cutting at the limit lowers the mean
        draws = np.minimum(draws * limit / 4 / draws.mean(), limit)
    return [limit - int(limit - n) // block_size * block_size for n in draws]


def read_rollouts(path: str, block_size: int, vocabulary: int, count: int) -> list[Rollout]:
    """The first `count` trajectories of a rollouts.jsonl (dipo.py): lengths and step maps, random tokens.

    Raises:
        InputError: a record without prompt_tokens or steps, or one that is no whole blocks.
    """
    rng, rollouts = random.Random(0), []
    for where, record in read_records(path)[:count]:
        prompt, steps = record.get("prompt_tokens"), record.get("steps")
        if type(prompt) is not int or prompt < 1:
            raise InputError(f"{where}: prompt_tokens is {prompt!r}, expected a positive integer")
        if not isinstance(steps, list) or not steps or any(type(s) is not int or s < 1 for s in steps):
            raise InputError(f"{where}: steps is no list of positive integers, one per response token")
        if (prompt + len(steps)) % block_size:
            raise InputError(f"{where}: {prompt} + {len(steps)} tokens are no blocks of {block_size}")
        ids = [rng.randrange(vocabulary) for _ in range(prompt + len(steps))]
        rollouts.append(_rollout(ids, steps))
    return rollouts


def rounds(
    rollout: Rollout, block_size: int, mask_id: int, pad_to_block_size: bool = False, limit: int = 0
) -> list[Packed]:
    """The published layout: a row [clean | noisy] per round, until no block has a step left.

    Scored is what is masked, with weight 1 where the round reveals the token and 0 elsewhere.
    (The order of the halves means nothing to the mask; `JointRow` wants the clean one first.)

    Args:
        pad_to_block_size: add rounds that score nothing, up to block_size of them.
        limit: pad both halves to this many tokens. As in the published code, padding sees no more
            than its own block and nothing sees it.
    """
    ids = torch.tensor(rollout.prompt_ids + rollout.response_ids)
    steps = np.array([0] * len(rollout.prompt_ids) + rollout.steps).reshape(-1, block_size).tolist()
    # rank: in which of its block's steps a token was revealed, from 1; 0 in the prompt
    order = [{step: i for i, step in enumerate(sorted({0, *block}))} for block in steps]
    rank = torch.tensor([r[s] for r, block in zip(order, steps, strict=True) for s in block])
    clean = torch.arange(len(ids))
    padding = torch.arange(2 * max(0, limit - len(ids)))  # a sequence of views of its first block
    positions = torch.cat([clean, clean, padding % block_size])
    noisy_view = 1 + clean // block_size
    view = torch.cat([0 * clean, noisy_view, padding // block_size])
    view[2 * len(ids) + block_size :] += len(ids)  # unlike those of the sequence
    passes = []
    for number in range(1, (block_size if pad_to_block_size else int(rank.max())) + 1):
        # a block that is finished by now is shown clean in the noisy half, and not scored
        masked = (rank >= number).nonzero()[:, 0]
        shown = [ids, ids.index_fill(0, masked, mask_id), torch.full_like(padding, mask_id)]
        passes.append(
            Packed(
                ids=torch.cat(shown),
                positions=positions,
                sequence=(torch.arange(len(positions)) >= 2 * len(ids)).long(),
                block=positions // block_size,
                view=view,
                scored=len(ids) + masked,
                targets=ids[masked],
                bounds=torch.zeros(len(masked)),
                weights=(rank[masked] == number).float(),
                advantages=torch.zeros(len(masked)),
                source=torch.zeros(len(masked), dtype=torch.long),
                engine_logprobs=torch.full((len(masked),), torch.nan),
                ages=torch.zeros(len(masked), dtype=torch.long),
                block_size=block_size,
            )
        )
    return passes


def score_rounds(
    model: sdar.BlockDiffusion, rollout: Rollout, block_size: int, mask_id: int, attention: str = "dense"
) -> tuple[torch.Tensor, int]:
    """Log-probability of every response token at its reveal [R], and the tokens forwarded.

    Written without `model.score`, so that it can be tested against this.
    """
    logprobs = torch.zeros(len(rollout.prompt_ids) + len(rollout.response_ids))
    tokens = 0
    for one in rounds(rollout, block_size, mask_id):
        hidden = model.model(
            input_ids=one.ids[None],
            position_ids=one.positions[None],
            use_cache=False,
            attention=sdar.attention_over(one, attention),
        ).last_hidden_state[0]
        log_p = model.lm_head(hidden[one.scored]).float().log_softmax(-1)  # [M, V]
        of_token = log_p.gather(1, one.targets[:, None])[:, 0]
        logprobs = logprobs.index_add(0, one.positions[one.scored], one.weights * of_token)
        tokens += len(one)
    return logprobs[len(rollout.prompt_ids) :], tokens


def count_tokens(rollout: Rollout, block_size: int) -> tuple[int, int]:
    """Forward tokens: packed, and by B rounds of 2L."""
    length = len(rollout.prompt_ids) + len(rollout.response_ids)
    return replay(rollout, block_size, weight=1.0).num_tokens, block_size * 2 * length
