"""The packed layout forwards as many tokens fewer than the published one as is claimed for it."""

import random

import layout
import pytest
from conftest import random_rollout


@pytest.mark.parametrize(
    ("tpf", "at_least", "packed_tokens"), [(1, 1.7, 9216 + 8192 * 4), (2, 2.8, 9216 + 8192 * 2)]
)
def test_token_ratio_of_a_long_trajectory(tpf, at_least, packed_tokens):
    rollout = layout.random_trajectory(1024, 8192, tpf, block_size=4, vocabulary=256)
    assert rollout.tokens_per_forward == tpf
    packed, published = layout.count_tokens(rollout, block_size=4)
    assert packed == packed_tokens, "L + R * B / TPF"
    assert published == 4 * 2 * 9216, "B * 2L"
    assert published / packed >= at_least


@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
def test_rounds_reveal_every_token_once(block_size):
    rollout = random_rollout(random.Random(block_size), block_size, prompt=block_size + 1, blocks=3)
    prompt = len(rollout.prompt_ids)
    passes = layout.rounds(rollout, block_size, mask_id=999)
    revealed = [i for one in passes for i in one.masked[one.revealed].tolist()]
    assert sorted(revealed) == list(range(prompt, prompt + len(rollout.response_ids)))
    padded = layout.rounds(rollout, block_size, mask_id=999, pad_to_block_size=True)
    assert len(padded) == block_size
    assert not any(one.revealed.any() for one in padded[len(passes) :])


def test_rounds_show_the_worked_example():
    """prompt [5 6], response [7 8 9 1 2 3], steps [1 2 3 3 4 3], as in masking.replay."""
    rollout = layout.Rollout.of([5, 6], [7, 8, 9, 1, 2, 3])
    rollout.steps = [1, 2, 3, 3, 4, 3]
    first, second = layout.rounds(rollout, block_size=4, mask_id=0)
    assert first.ids.tolist() == [5, 6, 7, 8, 9, 1, 2, 3] + [5, 6, 0, 0, 0, 0, 0, 0]
    assert first.masked[first.revealed].tolist() == [2, 4, 5, 7]
    assert second.ids.tolist() == [5, 6, 7, 8, 9, 1, 2, 3] + [5, 6, 7, 0, 9, 1, 0, 3]
    assert second.masked[second.revealed].tolist() == [3, 6]
