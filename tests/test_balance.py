"""How sequences are dealt out to ranks: evenly, in step, and each with what belongs to it."""

import random

import numpy as np
import pytest
import torch
from conftest import random_rollout
from torch.distributed.fsdp import fully_shard

from masking import replay
from plumbing.balance import plan_ranks
from plumbing.ranks import micro_batches


def log_normal(rng: np.random.Generator, count: int) -> np.ndarray:
    """Response tokens: mean 2,000 before the cut at 8,192, whole blocks of 4."""
    lengths = rng.lognormal(np.log(2000) - 0.32, 0.8, count)
    return np.minimum(lengths, 8192).astype(int) // 4 * 4 + 4


def two_humps(rng: np.random.Generator, count: int) -> np.ndarray:
    """Short answers, and a third that ran into the limit without an end."""
    return np.where(rng.random(count) < 0.33, 8192, rng.integers(10, 200, count) * 4)


def few_giants(rng: np.random.Generator, count: int) -> np.ndarray:
    """Three answers are forty times as long as the others."""
    return np.where(np.arange(count) < 3, 8192, 200)


def packed_sizes(rng: np.random.Generator, responses: np.ndarray) -> list[int]:
    """Packed tokens: prompt and response once, and a block per denoising step at 1 to 4 tokens each."""
    prompts = rng.integers(10, 100, len(responses)) * 4
    return (
        (prompts + responses + 4 * np.ceil(responses / rng.uniform(1, 4, len(responses))))
        .astype(int)
        .tolist()
    )


def loads_of(plan: list[list[list[int]]], sizes: list[int]) -> np.ndarray:
    """[ranks, rows] packed tokens."""
    return np.array([[sum(sizes[i] for i in row) for row in rows] for rows in plan])


@pytest.mark.parametrize("lengths", [log_normal, two_humps, few_giants])
@pytest.mark.parametrize("ranks", [2, 8])
def test_no_rank_has_five_percent_more_than_the_mean(lengths, ranks):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        sizes = packed_sizes(rng, lengths(rng, 1024))
        plan = plan_ranks(sizes, 49152, ranks)
        assert sorted(i for rows in plan for row in rows for i in row) == list(range(1024))
        loads = loads_of(plan, sizes)  # a ragged plan would be no array
        assert loads.max() <= 49152 and loads.min() > 0
        assert loads.sum(1).max() <= 1.05 * loads.sum(1).mean()
        in_step = loads.max(0).sum()  # ranks wait for the slowest in every row
        assert in_step <= 1.05 * loads.sum(1).mean(), "rows that run at the same time differ"
        fewest = -(-sum(sizes) // (49152 * ranks))
        assert loads.shape[1] <= 1.05 * fewest + 1


def test_dealing_out_in_the_order_of_arrival_is_worse():
    """The test above can fail."""
    rng = np.random.default_rng(0)
    sizes = packed_sizes(rng, log_normal(rng, 1024))
    naive = np.array([sum(sizes[rank::8]) for rank in range(8)])
    assert naive.max() > 1.05 * naive.mean()


def test_plans_of_few_sequences():
    rng = random.Random(0)
    for _ in range(300):
        sizes = [rng.randint(1, 60) for _ in range(rng.randint(0, 12))]
        ranks, budget = rng.randint(1, 5), rng.randint(10, 90)
        plan = plan_ranks(sizes, budget, ranks)
        assert plan == plan_ranks(sizes, budget, ranks), "no randomness: ranks plan for themselves"
        assert len(plan) == ranks and len({len(rows) for rows in plan}) == 1
        rows = [row for rows in plan for row in rows]
        assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
        assert all(len(row) == 1 or sum(sizes[i] for i in row) <= budget for row in rows)
        if len(sizes) >= len(rows):
            assert all(rows), "a forward pass that could have been avoided"


def test_the_size_that_is_planned_with_is_that_of_the_packed_row():
    for seed in range(20):
        r = random_rollout(random.Random(seed), block_size=4)
        size = len(r.prompt_ids) + len(r.response_ids) + 4 * r.num_steps
        assert size == replay(r, 4, weight=1.0).num_tokens


def test_gradients_are_summed_over_ranks_in_the_last_pass_only():
    """One rank is enough to see when FSDP2 reduces: the sharded gradient appears then."""
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    torch.manual_seed(0)
    rows = list(torch.randn(3, 5, 4))
    found, reduced = {}, {}
    for once in (True, False):
        torch.manual_seed(1)
        model = torch.nn.Linear(4, 2)
        fully_shard(model)
        reduced[once] = []
        for row in micro_batches(model, rows, reduce_once=once):
            model(row).square().sum().backward()
            reduced[once].append(model.weight.grad is not None)
        found[once] = model.weight.grad.full_tensor()
    assert reduced == {True: [False, False, True], False: [True, True, True]}
    torch.manual_seed(1)
    plain = torch.nn.Linear(4, 2)
    plain(torch.cat(rows)).square().sum().backward()
    for gradient in found.values():
        assert torch.allclose(gradient, plain.weight.grad, rtol=1e-5)
