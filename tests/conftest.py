"""What several test files share: a tiny random checkpoint and random trajectories.

The checkpoint's weights are drawn much wider than usual (initializer_range 0.3), so that its
distributions are peaked and a wrong mask, position or step is no rounding error.

    def test_something(tiny_model):
        rollout = random_rollout(random.Random(0), block_size=4)
"""

import math
import random
import signal
from pathlib import Path

import pytest
import torch
from zygote import Zygote

import dipo
import model
import sft
from masking import pack, replay
from plumbing.checkpoint import gathered, load_tokenizer, tiny
from plumbing.ranks import start_distributed
from plumbing.run_folder import RunFolder, lr_at, make_optimizer, set_lr
from rollout import Rollout, make_engine

# Where the tests run in the background SIGINT is ignored, and the processes that they start inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

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
def zygote():
    """Processes for a tenth of a second, where the imports of the scripts are not what is tested."""
    zygote = Zygote(["sft", "dipo", "evaluate"], fresh=True)
    yield zygote
    zygote.close()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A checkpoint folder with its tokenizer, block size 4. Read only: the session shares it."""
    return tiny(tmp_path_factory.mktemp("checkpoint") / "tiny", **TINY)


@pytest.fixture
def tiny_model(tiny_folder) -> model.BlockDiffusion:
    """The checkpoint, loaded afresh in float32 on the CPU, so that a test may change it."""
    return model.load(str(tiny_folder))


@pytest.fixture(scope="session")
def tokenizer(tiny_folder):
    """Its tokenizer: bytes, <|endoftext|>, <|im_start|>, <|im_end|>, <|MASK|> and the roles."""
    return load_tokenizer(str(tiny_folder))


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
    bounds = {step: math.log(rng.uniform(0.05, 1.0)) for step in sorted(set(steps))}
    block_of = [(prompt + i) // block_size for i in range(response)]
    held_at = []  # of each token: the earlier steps of its block
    for block, step in zip(block_of, steps, strict=True):
        of_block = {s for b, s in zip(block_of, steps, strict=True) if b == block}
        held_at.append(sorted(s for s in of_block if s < step))
    return Rollout(
        prompt_ids=[rng.randrange(WORDS) for _ in range(prompt)],
        response_ids=[rng.randrange(WORDS) for _ in range(response)],
        steps=steps,
        logprobs=[-5 * rng.random() for _ in range(response)],
        hold_bounds=[[bounds[step] for step in held] for held in held_at],
        hold_logprobs=[[-rng.random() for _ in held] for held in held_at],
        num_tokens=response,
        finish_reason="length",
        seed=0,
    )


def rollout_of(prompt_ids: list[int], response_ids: list[int]) -> Rollout:
    """A rollout with a token per step from the left."""
    n = len(response_ids)
    return Rollout(prompt_ids, response_ids, list(range(1, n + 1)), [0.0] * n, n, "length")


@torch.no_grad()
def chi_square(rollouts: list[Rollout], network, how, block_size: int, mask_id: int) -> tuple[float, int]:
    """Of how often each trajectory was sampled, against its exact likelihood; and the degrees of freedom.

    All are of one prompt, with holds. Trajectories that are expected less than five times are taken together.
    """
    seen: dict[tuple, int] = {}
    examples: dict[tuple, Rollout] = {}
    for rollout in rollouts:
        bounds = [tuple(round(bound, 3) for bound in of_token) for of_token in rollout.hold_bounds]
        key = tuple(rollout.response_ids), tuple(rollout.steps), tuple(bounds)
        seen[key] = seen.get(key, 0) + 1
        examples[key] = rollout
    views = [replay(r, block_size, 1.0, exact=True) for r in examples.values()]
    log_likelihood = torch.zeros(len(views))
    for row in pack(views, block_size, mask_id, 8192):
        log_likelihood.index_add_(0, row.source, network.score(row, how).logprobs.float())
    expected = len(rollouts) * log_likelihood.double().exp()
    found = torch.tensor(list(seen.values()), dtype=torch.double)
    often = expected >= 5
    found = torch.cat([found[often], (len(rollouts) - found[often].sum())[None]])
    expected = torch.cat([expected[often], (len(rollouts) - expected[often].sum())[None].clamp(min=5)])
    return float(((found - expected) ** 2 / expected).sum()), len(found) - 1


# --------------------------------------------------- the loops of sft.py and dipo.py, a step at a time


class Trainer:
    """What the mains of sft.py and dipo.py hold, and their optimizer step; gradients are kept.

    `gradients` has what the optimizer saw at each step, gathered and after clipping.
    """

    def __init__(self, config):
        self.config = config
        self.rank, self.world, self.device = start_distributed()
        self.folder = RunFolder(config)
        self.tokenizer = load_tokenizer(self.folder.weights)
        self.model = model.load_for_training(self.folder.base, self.device, config)
        self.block_size = model.choose_block_size(config.block_size, self.model.config)
        self.mask_id = self.tokenizer.mask_token_id
        self.optimizer = make_optimizer(self.model, config)
        self.folder.restore(self.model, self.optimizer)
        self.step, self.gradients = self.folder.step, []

    def engine(self):
        """The rollout engine with the weights that the run goes on with."""
        return make_engine(
            self.folder.weights, self.tokenizer, self.block_size, self.config, self.folder.engine_log
        )

    def optimizer_step(self, update: int = 0, updates: int = 1) -> float:
        """Clip, step, clear gradients; the norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        named = self.model.named_parameters()
        self.gradients.append({n: gathered(p.grad.detach()).clone() for n, p in named if p.grad is not None})
        set_lr(self.optimizer, lr_at(self.config, self.step * updates + update, self.config.steps * updates))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return gathered(norm).item()

    def sft_step(self, batch: list[tuple]) -> dict:
        """One optimizer step on (number, example) pairs, as in sft.main."""
        parts = (self.block_size, self.mask_id, self.device)
        metrics = sft.accumulate_gradients(self.model, batch, self.config, *parts)
        return metrics | {"grad_norm": self.optimizer_step()}

    def dipo_step(self, groups: list, reference=None) -> dict:
        """All updates on one batch of groups, as in dipo.main."""
        packs = dipo.pack_groups(groups, self.config, self.block_size, self.mask_id)
        rows = dipo.score_rows(packs, self.model, reference, self.config)
        stats = []
        for update in range(self.config.updates):
            stats += dipo.accumulate_gradients(self.model, rows, self.config, first_update=update == 0)
            norm = self.optimizer_step(update, self.config.updates)
        return dipo.training_metrics(stats, self.config) | {"grad_norm": norm}
