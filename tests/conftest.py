"""What several test files share: a tiny random checkpoint and random trajectories.

The checkpoint's weights are drawn much wider than usual (initializer_range 0.3), so that its
distributions are peaked and a wrong mask, position or step is no rounding error.

    def test_something(tiny_model):
        rollout = random_rollout(random.Random(0), block_size=4)
"""

import random
from pathlib import Path

import pytest
import torch

import model
from rollout import Rollout

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "head_dim": 16,  # 4 query heads on 2 key heads
    "initializer_range": 0.3,
}
WORDS = 256  # tokens below this one are bytes; the special tokens come after


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny matrices gain nothing from threads, and lose much on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A checkpoint folder with its tokenizer, block size 4. Read only: the session shares it."""
    return model.tiny(tmp_path_factory.mktemp("checkpoint") / "tiny", **TINY)


@pytest.fixture
def tiny_model(tiny_folder) -> model.BlockDiffusion:
    """The checkpoint, loaded afresh in float32 on the CPU, so that a test may change it."""
    return model.load(str(tiny_folder))


@pytest.fixture(scope="session")
def tokenizer(tiny_folder):
    """Its tokenizer: bytes, <|endoftext|>, <|im_start|>, <|im_end|>, <|MASK|> and the roles."""
    return model.load_tokenizer(str(tiny_folder))


def random_steps(rng: random.Random, prompt: int, response: int, block_size: int) -> list[int]:
    """A step map as the decoder would number it: from 1 on, block after block.

    Each step reveals a random non-empty set of the positions that its block has not revealed yet.
    """
    steps, step = [0] * (prompt + response), 0
    for start in range(prompt // block_size * block_size, prompt + response, block_size):
        left = [i for i in range(start, start + block_size) if i >= prompt]
        while left:
            step += 1
            for i in rng.sample(left, rng.randint(1, len(left))):
                steps[i] = step
                left.remove(i)
    return steps[prompt:]


def random_rollout(
    rng: random.Random, block_size: int, prompt: int | None = None, blocks: int | None = None
) -> Rollout:
    """A whole-block trajectory of random tokens (none special) with a random step map.

    Args:
        prompt: prompt tokens, else 1 to 3 * block_size; it may end inside a block.
        blocks: blocks with generated tokens, the one that the prompt opens included, else 1 to 4.
    """
    prompt = rng.randint(1, 3 * block_size) if prompt is None else prompt
    blocks = rng.randint(1, 4) if blocks is None else blocks
    response = (prompt // block_size + blocks) * block_size - prompt
    steps = random_steps(rng, prompt, response, block_size)
    bound_of_step = {step: rng.uniform(0.05, 1.0) for step in sorted(set(steps))}
    return Rollout(
        prompt_ids=[rng.randrange(WORDS) for _ in range(prompt)],
        response_ids=[rng.randrange(WORDS) for _ in range(response)],
        steps=steps,
        logprobs=[-5 * rng.random() for _ in range(response)],
        hold_bounds=[bound_of_step[step] for step in steps],
        num_tokens=response,
        finish_reason="length",
        seed=0,
    )
