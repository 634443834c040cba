"""The published layout is built as described, and the packed one forwards as many tokens fewer as is claimed."""

import random

import layout
import pytest
import torch
from conftest import random_rollout

from masking import HOLD, dense_mask

MASK = 259


@pytest.mark.parametrize(
    ("tpf", "at_least", "packed_tokens"), [(1, 1.7, 9216 + 8192 * 4), (2, 2.8, 9216 + 8192 * 2)]
)
def test_token_ratio_of_a_long_trajectory(tpf, at_least, packed_tokens):
    rollout = layout.random_trajectory(1024, 8192, tpf, block_size=4, vocabulary=256)
    assert rollout.tokens_per_forward == pytest.approx(tpf, rel=0.02)
    packed, published = layout.count_tokens(rollout, block_size=4)
    assert packed == pytest.approx(packed_tokens, rel=0.02), "L + R * B / TPF"
    assert published == 4 * 2 * 9216, "B * 2L"
    assert published / packed >= at_least
    assert len(layout.rounds(rollout, 4, MASK)) == 4, "all B rounds reveal something"


@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
def test_rounds_reveal_every_token_once(block_size):
    rollout = random_rollout(random.Random(block_size), block_size, prompt=block_size + 1, blocks=3)
    prompt, length = len(rollout.prompt_ids), len(rollout.prompt_ids + rollout.response_ids)
    passes = layout.rounds(rollout, block_size, mask_id=999)
    revealed = [i for one in passes for i in one.positions[one.rows][one.weights > 0].tolist()]
    assert sorted(revealed) == list(range(prompt, length))
    for one in passes:
        assert (one.ids[one.rows] == 999).all() and (one.targets != HOLD).all()
        assert len(one) == 2 * length
    padded = layout.rounds(rollout, block_size, mask_id=999, pad_to_block_size=True)
    assert len(padded) == block_size
    assert not any(len(one.rows) and one.weights.any() for one in padded[len(passes) :])


def test_rounds_show_the_worked_example():
    """prompt [5 6], response [7 8 9 1 2 3], steps [1 2 3 3 4 3], as in masking.replay."""
    rollout = layout.Rollout.of([5, 6], [7, 8, 9, 1, 2, 3])
    rollout.steps = [1, 2, 3, 3, 4, 3]
    first, second = layout.rounds(rollout, block_size=4, mask_id=0)
    assert first.ids.tolist() == [5, 6, 7, 8, 9, 1, 2, 3] + [5, 6, 0, 0, 0, 0, 0, 0]
    assert first.positions[first.rows][first.weights > 0].tolist() == [2, 4, 5, 7]
    assert second.ids.tolist() == [5, 6, 7, 8, 9, 1, 2, 3] + [5, 6, 7, 0, 9, 1, 0, 3]
    assert second.positions[second.rows][second.weights > 0].tolist() == [3, 6]


@pytest.mark.parametrize("attention", ["dense", "joint"])
def test_padding_changes_no_score(tiny_model, attention):
    """... and sees nothing but its own block."""
    rollout = random_rollout(random.Random(3), 4, prompt=6, blocks=3)
    plain = layout.rounds(rollout, 4, MASK)
    padded = layout.rounds(rollout, 4, MASK, limit=40)
    length = len(plain[0])
    for one, longer in zip(plain, padded, strict=True):
        assert len(longer) == 80
        seen = dense_mask(longer)
        assert torch.equal(seen[:length, :length], dense_mask(one))
        assert not seen[:length, length:].any()
        assert (seen[length:].sum(1) == 4).all()
        with torch.no_grad():
            scores = [tiny_model.score(p, layout.sdar.Sampling(), attention).logprobs for p in (one, longer)]
        assert (scores[0] - scores[1]).abs().max() < 1e-5
