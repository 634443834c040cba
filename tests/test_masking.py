"""Who sees whom and what is scored, against rules written out in plain Python."""

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORDS, random_rollout, rollout_of

from masking import (
    HOLD,
    Packed,
    Trajectory,
    all_masked,
    block_mask,
    dense_mask,
    noise,
    pack,
    padded,
    replay,
    visible,
)
from plumbing.balance import plan_packs
from plumbing.common import InputError

MASK = 999
SCRIPT = Path(__file__).resolve().parents[1] / "masking.py"


def sees(q: tuple[int, int, int], kv: tuple[int, int, int]) -> bool:
    """The rule, line by line; a token is (sequence, block, view)."""
    q_sequence, q_block, q_view = q
    kv_sequence, kv_block, kv_view = kv
    if q_view == 0 and kv_view == 0:  # clean q sees clean kv
        return q_sequence == kv_sequence and kv_block <= q_block
    if q_view != 0 and kv_view == 0:  # view q sees clean kv
        return q_sequence == kv_sequence and kv_block < q_block
    if q_view != 0 and kv_view != 0:  # view q sees kv of a view
        return q_view == kv_view
    return False  # nothing else


def brute_force(row: Packed) -> torch.Tensor:
    tokens = list(zip(*(t.tolist() for t in (row.sequence, row.block, row.view)), strict=True))
    return torch.tensor([[sees(q, kv) for kv in tokens] for q in tokens])


def random_row(seed: int, block_size: int, sequences: int, exact: bool = False, **how) -> Packed:
    """One packed row of several random trajectories."""
    rng = random.Random(seed)
    rollouts = [random_rollout(rng, block_size, **how) for _ in range(sequences)]
    views = [replay(r, block_size, weight=1.0, exact=exact) for r in rollouts]
    (row,) = pack(views, block_size, MASK, token_budget=10**9)
    return row


def noised_row(seed: int, lengths: list[int], block_size: int, views: int = 2) -> Packed:
    rng = np.random.default_rng(seed)
    sequences = [
        noise(rng.integers(0, WORDS, n).tolist(), n // 3, block_size, rng, "block", views) for n in lengths
    ]
    (row,) = pack(sequences, block_size, MASK, token_budget=10**9)
    return row


def one_token_a_step(prompt: int, response: int) -> Packed:
    """A row of prompt + 5 * response tokens, block size 4."""
    rollout = rollout_of([1] * prompt, [2] * response)
    return pack([replay(rollout, 4, weight=1.0)], 4, MASK, token_budget=10**9)[0]


# ----------------------------------------------------------------------------------- who sees whom


def test_visible_is_the_rule_for_all_small_tags():
    tags = [(s, b, v) for s in range(2) for b in range(3) for v in range(3)]
    for q in tags:
        for kv in tags:
            if q[2] and q[2] == kv[2] and q[0] != kv[0]:
                continue  # a view number belongs to one sequence
            assert bool(visible(*q, *kv)) == sees(q, kv), f"query {q}, key {kv}"


@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
@pytest.mark.parametrize("sequences", [1, 3])
def test_dense_mask_is_the_rule(block_size, sequences):
    for seed in range(3):
        row = random_row(seed, block_size, sequences)
        assert torch.equal(dense_mask(row), brute_force(row))
    row = noised_row(0, [5 * block_size, 9 * block_size], block_size)
    assert torch.equal(dense_mask(row), brute_force(row))


def test_views_of_one_block_do_not_see_each_other():
    row = random_row(0, block_size=4, sequences=2)
    views = row.view != 0
    between = dense_mask(row) & views[:, None] & views[None]
    assert torch.equal(between, views[:, None] & (row.view[:, None] == row.view[None]))


def tiles_of(count: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """[tiles, tiles] booleans from the lists that FlexAttention takes."""
    count, indices = count[0, 0], indices[0, 0]
    listed = torch.zeros(indices.shape, dtype=torch.bool)
    for query, (number, keys) in enumerate(zip(count.tolist(), indices.tolist(), strict=True)):
        listed[query, keys[:number]] = True
    return listed


def per_tile(dense: torch.Tensor, tile: int) -> torch.Tensor:
    """[N, N] -> [tiles, tiles, tile * tile], padded with False."""
    n = -(-len(dense) // tile)
    padded = torch.zeros(n * tile, n * tile, dtype=torch.bool)
    padded[: len(dense), : len(dense)] = dense
    return padded.view(n, tile, n, tile).transpose(1, 2).reshape(n, n, -1)


ROWS = {
    "one sequence": lambda: random_row(1, 4, 1, prompt=61, blocks=40),
    "one, 4 tiles of 128": lambda: one_token_a_step(prompt=192, response=64),
    "one, block 1": lambda: random_row(1, 1, 1, prompt=61, blocks=40),
    "one, block 8": lambda: random_row(1, 8, 1, prompt=61, blocks=30),
    "four sequences": lambda: random_row(2, 4, 4, prompt=33, blocks=20),
    "many short ones": lambda: random_row(3, 4, 30),
    "noise": lambda: noised_row(1, [100, 244, 36], 4),
    "noise, block 1": lambda: noised_row(2, [100, 51], 1),
}


@pytest.mark.parametrize("tile", [4, 16, 32, 128])
@pytest.mark.parametrize("name", ROWS)
def test_block_mask_tiles(name, tile):
    row = ROWS[name]()
    mask, dense = block_mask(row, tile), dense_mask(row)
    partial = tiles_of(mask.kv_num_blocks, mask.kv_indices)
    full = tiles_of(mask.full_kv_num_blocks, mask.full_kv_indices)
    truth = per_tile(dense, tile)
    assert not (partial & full).any(), "a tile is listed twice"
    assert not (truth.any(-1) & ~partial & ~full).any(), "a visible pair is in no listed tile"
    assert not (full & ~truth.all(-1)).any(), "a full tile has an invisible pair"
    assert not (truth.all(-1) & ~full).any(), "every full tile is known to be full"
    assert not (partial & ~truth.any(-1)).any(), "no listed tile is empty"
    # the element-wise rule that partial tiles evaluate
    i = torch.arange(len(row))
    assert torch.equal(mask.mask_mod(0, 0, i[:, None], i[None]), dense)


@pytest.mark.parametrize("name", ROWS)
def test_a_padded_row_is_the_row_and_tokens_nobody_sees(name):
    row = ROWS[name]()
    whole, n = padded(row), len(row)
    assert len(whole) % 128 == 0 and len(whole) - n < 128
    seen = brute_force(whole)
    assert torch.equal(seen[:n, :n], brute_force(row)) and not seen[:n, n:].any() and not seen[n:, :n].any()
    assert bool(seen.any(-1).all()), "an empty row of the mask would be nan"
    assert torch.equal(dense_mask(whole), seen)
    i = torch.arange(len(whole))
    assert torch.equal(block_mask(whole).mask_mod(0, 0, i[:, None], i[None]), seen)
    for name in ("scored", "targets", "weights", "advantages", "source"):
        assert torch.equal(getattr(whole, name), getattr(row, name))
    assert padded(whole).ids.shape == whole.ids.shape


@pytest.mark.parametrize("tile", [32, 128])
def test_block_mask_transposed_lists(tile):
    """The backward pass walks from keys to queries."""
    row = ROWS["four sequences"]()
    mask = block_mask(row, tile)
    for forward, backward in (
        ((mask.kv_num_blocks, mask.kv_indices), (mask.q_num_blocks, mask.q_indices)),
        (
            (mask.full_kv_num_blocks, mask.full_kv_indices),
            (mask.full_q_num_blocks, mask.full_q_indices),
        ),
    ):
        assert torch.equal(tiles_of(*forward), tiles_of(*backward).T)


def test_block_mask_of_a_long_row_needs_no_dense_mask():
    """Over 40k tokens: an N x N tensor of booleans would be 1.6 GB."""
    rng = np.random.default_rng(0)
    views = [noise(rng.integers(0, WORDS, 10_000).tolist(), 1000, 4, rng, views=2) for _ in range(2)]
    (row,) = pack(views, 4, MASK, token_budget=10**9)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for t in result if isinstance(result, (tuple, list)) else [result]:
                if torch.is_tensor(t):
                    largest.append(t.numel())
            return result

    start = time.perf_counter()
    with Watch():
        block_mask(row)
    assert len(row) > 40_000
    tiles = -(-len(row) // 128)
    assert max(largest) <= 2 * max(tiles**2, 2 * tiles * 128), "time and memory are O(tiles^2)"
    assert time.perf_counter() - start < 30


def flex_inputs(row: Packed, heads: int = 4, kv_heads: int = 2, dim: int = 16):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, h, len(row), dim) for h in (heads, kv_heads, kv_heads)]
    return [1.5 * torch.randn(shape, generator=generator) for shape in shapes]


def dense_attention(row: Packed, q, k, v) -> torch.Tensor:
    """Softmax attention written out, in float64."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1).double() for t in (k, v))
    scores = (q.double() @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    return scores.masked_fill(~brute_force(row), -torch.inf).softmax(-1) @ v


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["four sequences", "noise"])
def test_eager_flex_attention(name):
    from torch.nn.attention.flex_attention import flex_attention

    row = ROWS[name]()
    q, k, v = flex_inputs(row)
    out = flex_attention(q, k, v, block_mask=block_mask(row), enable_gqa=True)
    assert (out - dense_attention(row, q, k, v)).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_flex_attention():
    """The compiled kernel is the one that walks the tiles; the eager one only asks mask_mod."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention)
    row = ROWS["four sequences"]()
    q, k, v = flex_inputs(row)
    out = compiled(q, k, v, block_mask=block_mask(row), enable_gqa=True)
    assert (out - dense_attention(row, q, k, v)).abs().max() < 1e-5


# ---------------------------------------------------------------------------- what a replay scores


def test_replay_worked_example():
    """The example in the docstring of masking.replay, literally."""
    rollout = rollout_of([5, 6], [7, 8, 9, 1, 2, 3])
    rollout.steps = [1, 2, 3, 3, 4, 3]
    rollout.logprobs = [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]
    rollout.hold_bounds = [[], [-0.1], [], [], [-0.3], []]  # 8 held at step 1, 2 at step 3
    rollout.hold_logprobs = [[], [-0.7], [], [], [-0.8], []]
    (row,) = pack([replay(rollout, 4, weight=0.5, advantage=-2.0)], 4, MASK, token_budget=99)
    _ = MASK
    clean = [5, 6, 7, 8, 9, 1, 2, 3]
    assert row.ids.tolist() == clean + [5, 6, _, _] + [5, 6, 7, _] + [_, _, _, _] + [9, 1, _, 3]
    assert row.positions.tolist() == [*range(8), 0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]
    assert row.block.tolist() == [0] * 4 + [1] * 4 + [0] * 8 + [1] * 8
    assert row.view.tolist() == [0] * 8 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert row.sequence.tolist() == [0] * 24
    assert row.scored.tolist() == [10, 15, 16, 17, 19, 22]
    assert row.targets.tolist() == [7, 8, 9, 1, 3, 2]
    assert row.engine_logprobs.tolist() == [-1, -2, -3, -4, -6, -5]
    assert row.weights.tolist() == [0.5] * 6
    assert row.advantages.tolist() == [-2.0] * 6

    (row,) = pack([replay(rollout, 4, weight=0.5, exact=True)], 4, MASK, token_budget=99)
    assert row.scored.tolist() == [10, 11, 15, 16, 17, 18, 19, 22]
    assert row.targets.tolist() == [7, HOLD, 8, 9, 1, HOLD, 3, 2]
    assert np.allclose(row.bounds[row.targets == HOLD], [-0.1, -0.3])
    assert np.allclose(row.engine_logprobs, [-1, -0.7, -2, -3, -4, -0.8, -6, -5])


def test_an_exact_replay_needs_the_holds():
    with pytest.raises(ValueError, match="holds=True"):
        replay(Trajectory([1], [2, 3, 4], [1, 1, 2], [0.0] * 3), 4, 1.0, exact=True)


@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
@pytest.mark.parametrize("exact", [False, True])
def test_replay_against_a_walk_through_the_decoder(block_size, exact):
    """What was shown and decided, by walking each trajectory step by step in plain Python."""
    rng = random.Random(block_size)
    rollouts = [random_rollout(rng, block_size) for _ in range(7)]
    views = [replay(r, block_size, 0.25 * (i + 1), exact, advantage=i - 3.0) for i, r in enumerate(rollouts)]
    packs = pack(views, block_size, MASK, token_budget=sum(v.num_tokens for v in views) // 2)
    assert len(packs) > 1, "the test wants several rows"
    found = {}  # (trajectory, step, position): what the row says
    for row in packs:
        assert len(row) % block_size == 0
        assert torch.equal(row.block, row.positions // block_size)
        for m, at in enumerate(row.scored.tolist()):
            assert row.ids[at] == MASK, "only masks are scored"
            assert row.view[at] > 0
            group = row.view == row.view[at]
            shown = tuple(row.ids[group].tolist())
            assert row.positions[group].tolist() == [
                int(row.block[at]) * block_size + j for j in range(block_size)
            ]
            key = (int(row.source[m]), shown, int(row.positions[at]))
            assert key not in found, "scored twice"
            found[key] = (
                int(row.targets[m]),
                pytest.approx(float(row.bounds[m]), abs=1e-6),
                pytest.approx(float(row.weights[m])),
                float(row.advantages[m]),
                pytest.approx(float(row.engine_logprobs[m]), nan_ok=True, abs=1e-5),
            )
    wanted = {}
    for index, r in enumerate(rollouts):
        ids, steps = r.prompt_ids + r.response_ids, [0] * len(r.prompt_ids) + r.steps
        for step in sorted(set(r.steps)):
            decided = [i for i in range(len(ids)) if steps[i] == step]
            (block,) = {i // block_size for i in decided}
            members = range(block * block_size, (block + 1) * block_size)
            shown = tuple(ids[i] if steps[i] < step else MASK for i in members)
            before = len({steps[i] for i in members if 0 < steps[i] < step})
            of_step = 0.0  # the bound of its reveals
            if exact:
                held_at = [i - len(r.prompt_ids) for i in members if steps[i] > step]
                none_held = np.inf if len(decided) == 1 else 0.0
                of_step = min((r.hold_bounds[at][before] for at in held_at), default=none_held)
            for i in members:
                at, numbers = i - len(r.prompt_ids), (0.25 * (index + 1), index - 3)
                if i in decided:
                    wanted[index, shown, i] = (ids[i], of_step, *numbers, r.logprobs[at])
                elif steps[i] > step and exact:
                    held = r.hold_bounds[at][before], r.hold_logprobs[at][before]
                    wanted[index, shown, i] = (HOLD, held[0], *numbers, held[1])
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        assert all(a == b for a, b in zip(found[key], values, strict=True)), key


@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
def test_every_token_once_and_a_view_per_step(block_size):
    rng = random.Random(7)
    for _ in range(20):
        rollout = random_rollout(rng, block_size)
        views = replay(rollout, block_size, weight=1.0)
        prompt, length = len(rollout.prompt_ids), views.ids.size
        assert len(views.block) == rollout.num_steps
        assert views.num_tokens == length + block_size * rollout.num_steps
        positions = views.block[:, None] * block_size + np.arange(block_size)
        assert sorted(positions[views.is_scored]) == list(range(prompt, length))
        assert (views.targets[views.is_scored] == views.ids[positions[views.is_scored]]).all()
        exact = replay(rollout, block_size, weight=1.0, exact=True)
        assert (exact.is_scored == exact.masked).all()
        assert ((exact.targets == HOLD) & exact.masked == exact.masked & ~views.is_scored).all()


def test_unfinished_blocks_are_refused():
    with pytest.raises(ValueError, match="a trajectory of 7 tokens is not whole blocks of 4"):
        replay(rollout_of([1, 2], [3, 4, 5, 6, 7]), 4, weight=1.0)


def test_views_are_unique_in_a_row_and_sequences_are_contiguous():
    row = random_row(5, 4, 6)
    for view in range(1, int(row.view.max()) + 1):
        assert (row.view == view).sum() == 4
    assert (row.sequence.diff() >= 0).all()
    assert sorted(set(row.source.tolist())) == list(range(6))


# ------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("per", ["sequence", "block"])
@pytest.mark.parametrize("block_size", [1, 4])
def test_a_complementary_pair_scores_every_response_token_once(per, block_size):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, WORDS, 48).tolist()
    for prompt in (0, 5, 16, 47):
        views = noise(ids, prompt, block_size, rng, per, views=4, complementary=True)
        positions = views.block[:, None] * block_size + np.arange(block_size)
        scored = sorted(positions[views.is_scored].tolist())
        assert scored == sorted(2 * list(range(prompt, 48))), "twice by two pairs"
        assert (views.targets == views.ids[positions]).all()
        assert views.masked.any(1).all(), "a block without a mask makes no view"
        assert (np.diff(views.block) >= 0).all()
        assert (views.is_scored == views.masked).all()


def test_noise_never_masks_the_prompt_and_drops_empty_blocks():
    rng = np.random.default_rng(1)
    ids = list(range(80))
    counts = set()
    for _ in range(50):
        views = noise(ids, 30, 4, rng, views=2)
        positions = views.block[:, None] * 4 + np.arange(4)
        assert positions[views.masked].min() >= 30
        assert views.masked.any(1).all()
        counts.add(len(views.block))
    assert len(counts) > 1, "how many views there are depends on the draw"
    assert max(counts) <= 2 * 13, "blocks 7 (half a prompt) to 19, twice"


@pytest.mark.parametrize("per", ["sequence", "block"])
@pytest.mark.parametrize(("views", "complementary"), [(1, False), (3, False), (2, True)])
def test_noise_is_unbiased(per, views, complementary):
    """E[sum of weights at a token] = E[1/t * P(masked | t)] = 1 for every response token."""
    rng = np.random.default_rng(2)
    draws, ids, prompt = 4000, list(range(24)), 6
    totals = np.zeros((draws, 24))
    for d in range(draws):
        v = noise(ids, prompt, 4, rng, per, views, complementary)
        positions = v.block[:, None] * 4 + np.arange(4)
        np.add.at(totals[d], positions[v.is_scored], v.weights[v.is_scored])
    assert (totals[:, :prompt] == 0).all()
    mean = totals[:, prompt:].mean(0)
    error = totals[:, prompt:].std(0) / draws**0.5
    assert (np.abs(mean - 1) < 4.5 * error).all(), f"{mean} with standard errors {error}"
    assert error.max() < 0.06, "the tolerance is tight enough to mean something"


def test_noise_rates():
    """One t for the sequence, or one per block; a complement has 1 - t; t stays in bounds."""
    rng = np.random.default_rng(3)
    ids = list(range(200))
    one = noise(ids, 0, 4, rng)
    assert len(np.unique(one.weights)) == 1
    each = noise(ids, 0, 4, rng, per="block")
    assert len(np.unique(each.weights[:, 0])) > 20
    assert (each.weights == each.weights[:, :1]).all(), "one t in a block"
    assert (1 / each.weights >= 0.02).all() and (1 / each.weights <= 0.98).all()
    pair = noise(ids, 0, 4, rng, views=2, complementary=True)
    t = np.unique(np.round(1 / (2 * pair.weights), 12))
    assert len(t) == 2 and t.sum() == pytest.approx(1.0)
    bounded = [noise(ids, 0, 4, rng, t_min=0.4).weights for _ in range(50)]
    assert all((1 / w >= 0.4).all() and (1 / w <= 0.6).all() for w in bounded)
    released = [noise(ids, 0, 4, rng, t_min=0.001, t_max=1.0).weights for _ in range(300)]
    rates = np.array([1 / w[0, 0] for w in released])
    assert (rates >= 0.001).all() and rates.min() < 0.02 and 0.98 < rates.max() <= 1.0
    same = [noise(ids, 0, 4, np.random.default_rng(5), t_max=t_max).weights for t_max in (0.0, 0.98)]
    assert (same[0] == same[1]).all()


def test_noise_repeats_with_its_generator():
    ids = list(range(40))
    a, b, c = (noise(ids, 7, 4, np.random.default_rng(s), "block", 2) for s in (5, 5, 6))
    assert (a.masked.shape == b.masked.shape) and (a.masked == b.masked).all()
    assert (a.weights == b.weights).all()
    assert a.masked.shape != c.masked.shape or (a.masked != c.masked).any()


# ----------------------------------------------------------------------------------------- packing


def test_plan_packs():
    rng = random.Random(0)
    for _ in range(200):
        sizes = [rng.randint(1, 60) for _ in range(rng.randint(1, 25))]
        budget = rng.randint(10, 120)
        plan = plan_packs(sizes, budget)
        assert sorted(i for row in plan for i in row) == list(range(len(sizes)))
        assert all(plan), "no row is empty"
        for row in plan:
            assert sum(sizes[i] for i in row) <= budget or len(row) == 1
        order = [sizes[i] for row in plan for i in row]
        assert order == sorted(sizes, reverse=True), "neighbours have similar lengths"


def test_plan_packs_edges():
    assert plan_packs([], 10) == []
    assert plan_packs([4, 50, 4], 10) == [[1], [0, 2]], "one larger than the budget stands alone"
    assert plan_packs([5, 5, 5], 10) == plan_packs([5, 5, 5], 10), "no randomness"


def test_packing_does_not_change_what_is_scored():
    rng = random.Random(1)
    views = [replay(random_rollout(rng, 4), 4, weight=1.0) for _ in range(9)]

    def actions(**how):
        rows = pack(views, 4, MASK, **how)
        return sorted(
            action
            for row in rows
            for action in zip(
                row.source.tolist(),
                row.positions[row.scored].tolist(),
                row.targets.tolist(),
                row.engine_logprobs.tolist(),
                strict=True,
            )
        )

    alone = actions(token_budget=1)
    assert (
        alone
        == actions(token_budget=10**9)
        == actions(token_budget=0, plan=[[3, 8, 0], [5], [], [1, 2, 7, 4, 6]])
    )


@pytest.mark.parametrize("prompt", range(8))
def test_all_masked_shows_the_prompt_only(prompt):
    """Of the block itself; before it stand the clean blocks, as for every view."""
    ids = list(range(100, 112))
    views = all_masked(ids, prompt, 4)
    (row,) = pack([views], 4, MASK, token_budget=99)
    assert row.ids[:12].tolist() == ids
    first = prompt // 4  # block with response tokens
    shown = [ids[i] if i < prompt else MASK for i in range(4 * first, 12)]
    assert row.ids[12:].tolist() == shown
    assert row.view[12:].tolist() == [1 + i // 4 for i in range(12 - 4 * first)]
    assert row.positions[row.scored].tolist() == list(range(prompt, 12))
    assert row.targets.tolist() == ids[prompt:]
    assert row.weights.tolist() == [1.0] * (12 - prompt) and not row.advantages.any()
    assert bool(row.engine_logprobs.isnan().all())


def test_to_moves_every_tensor():
    row = random_row(0, 4, 1).to("meta")
    tensors = [v for v in vars(row).values() if torch.is_tensor(v)]
    assert len(tensors) == 13 and all(t.device.type == "meta" for t in tensors)
    assert row.block_size == 4 and issubclass(InputError, ValueError)


def test_running_the_file_plots_the_mask(tmp_path):
    picture = tmp_path / "mask.png"
    result = subprocess.run(
        [sys.executable, str(SCRIPT), str(picture)], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 10_000
    assert result.stdout.startswith("40 tokens, 10 positions to score")
