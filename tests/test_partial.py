"""Partial rollouts: requests that stop after some tokens and go on later, in the engine and in the loop.

With frozen weights a rollout that was interrupted is the one that was not: every draw, step and figure.
"""

import dataclasses
import math
import random
from collections import Counter

import pytest
import torch
from conftest import TINY, WORDS, Trainer, chi_square, random_rollout
from data_rows import write_task
from test_dipo import (
    BLOCK,
    QUESTIONS,
    SPEED,
    assert_same,
    backward_by_hand,
    configured,
    gradients_of,
    logprobs_of,
)

import dipo
import model
from dipo import DiPOConfig, collect_groups, sample_groups
from masking import pack, replay
from plumbing import run_folder
from plumbing.checkpoint import named_weights, tiny
from plumbing.common import DataOrder, InputError, read_records
from plumbing.open_groups import OpenGroup, grow_older, more_questions, read_groups
from rollout import Decoding, Rollout, TorchEngine, generate_all

STOPS = list(range(0, WORDS, 40))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("partial")
    write_task(place)
    return tiny(place / "tiny", **TINY)


def engine_of(folder, block_size=BLOCK, stops=STOPS, max_batch=7) -> TorchEngine:
    network = model.load(str(folder))
    return TorchEngine(network, block_size, 259, stops, max_batch)


def prompts_of(count: int) -> list[list[int]]:
    return [[(7 * i + 3 * j) % WORDS for j in range(1 + i % 11)] for i in range(count)]


def interrupted(engine, prompts, seeds, how, tokens: int) -> tuple[list[Rollout], int]:
    """Generate with a pause after so many tokens, all together again and again; and the number of calls."""
    how = dataclasses.replace(how, partial_tokens=tokens)
    rollouts: list[Rollout | None] = [None] * len(prompts)
    open_, calls = list(range(len(prompts))), 0
    while open_:
        begun = [rollouts[i] for i in open_] if calls else None
        calls += 1
        new = engine.generate([prompts[i] for i in open_], [seeds[i] for i in open_], how, begun=begun)
        for i, rollout in zip(open_, new, strict=True):
            before = len(rollouts[i].response_ids) if rollouts[i] else 0
            grown = len(rollout.response_ids) - before
            if rollout.finish_reason == "unfinished":
                assert tokens <= grown < tokens + engine.block_size
                assert len(rollout.response_ids) < how.max_tokens
            assert 0 < grown < tokens + engine.block_size
            rollouts[i] = rollout
        open_ = [i for i in open_ if rollouts[i].finish_reason == "unfinished"]
    return rollouts, calls


def assert_same_rollouts(found: list[Rollout], wanted: list[Rollout], tolerance: float = 1e-4) -> None:
    """All decisions; log-probabilities up to the rounding of a prefill instead of single blocks."""
    for one, other in zip(found, wanted, strict=True):
        numbers = ("logprobs", "hold_bounds", "hold_logprobs")
        free = {name: [] for name in numbers}
        assert dataclasses.replace(one, **free) == dataclasses.replace(other, **free)
        for name in numbers:
            ours, theirs = getattr(one, name), getattr(other, name)
            assert len(ours) == len(theirs)
            for x, y in zip(ours, theirs, strict=True):
                assert x == pytest.approx(y, abs=tolerance), name


HOWS = {
    "greedy": Decoding(top_k=1, threshold=0.3),
    "sampled": Decoding(threshold=0.5, holds=True),
    "dithered": Decoding(threshold=0.8, dither=0.7, holds=True),
    "cut": Decoding(rule="static", denoising_steps=2, top_k=9, top_p=0.9, temperature=0.7),
    "sequential": Decoding(rule="sequential", denoising_steps=3, holds=True),
    "not too short": Decoding(threshold=0.5, min_tokens=14, banned_ids=[5, 6, 7]),
}


# ------------------------------------------------------------------------------------ the engine


@pytest.mark.parametrize("block_size", [1, 4, 8])
@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_an_interrupted_rollout_is_the_uninterrupted_one(folder, how, block_size):
    engine, prompts = engine_of(folder, block_size), prompts_of(24)
    how = dataclasses.replace(how, max_tokens=29)
    wanted = engine.generate(prompts, range(24), how)
    assert {r.finish_reason for r in wanted} == {"stop", "length"}
    for tokens in (1, 5, 12):
        found, calls = interrupted(engine, prompts, range(24), how, tokens)
        assert_same_rollouts(found, wanted)
        assert calls > 1
    found, calls = interrupted(engine, prompts, range(24), how, 40)
    assert found == wanted and calls == 1, "long enough: bit for bit"


def test_without_partial_tokens_a_rollout_that_was_begun_goes_to_its_end(folder):
    engine, prompts = engine_of(folder), prompts_of(24)
    how = Decoding(threshold=0.5, max_tokens=29, holds=True)
    begun = engine.generate(prompts, range(24), dataclasses.replace(how, partial_tokens=9))
    assert {r.finish_reason for r in begun} == {"stop", "unfinished"}
    left = [i for i in range(24) if begun[i].finish_reason == "unfinished"]
    seeds = [begun[i].seed for i in left]
    ended = engine.generate([prompts[i] for i in left], seeds, how, begun=[begun[i] for i in left])
    wanted = engine.generate(prompts, range(24), how)
    assert_same_rollouts(ended, [wanted[i] for i in left])


def test_new_ones_and_those_that_go_on_are_generated_together(folder):
    engine, prompts = engine_of(folder), prompts_of(12)
    how = Decoding(threshold=0.5, max_tokens=29)
    wanted = engine.generate(prompts, range(12), how)
    begun = engine.generate(prompts[:6], range(6), dataclasses.replace(how, partial_tokens=6))
    mixed = [r if r.finish_reason == "unfinished" else None for r in begun] + [None] * 6
    assert_same_rollouts(engine.generate(prompts, range(12), how, begun=mixed), wanted)


def test_what_is_lost_on_the_way_is_begun_again_from_its_own_blocks(folder):
    """An engine that loses every other rollout of its first calls, as one whose process dies does."""
    engine, prompts = engine_of(folder), prompts_of(8)
    how = Decoding(threshold=0.5, max_tokens=29, partial_tokens=8)
    begun = engine.generate(prompts, range(8), how)
    open_ = [i for i in range(8) if begun[i].finish_reason == "unfinished"]
    old = [begun[i] for i in open_]
    request = [prompts[i] for i in open_], open_, how
    wanted = engine.generate(*request, begun=old)
    generate, calls = engine.generate, []

    def forgetful(*arguments):
        calls.append(arguments)
        found = generate(*arguments)
        return [None if i % 2 and len(calls) < 3 else r for i, r in enumerate(found)]

    engine.generate = forgetful
    found = generate_all(engine, *request, weights=lambda: named_weights(engine.model), begun=old)
    assert_same_rollouts(found, wanted)
    assert len(calls) == 3


# ----------------------------------------------------------- other weights and seeds per segment


def test_segments_with_seeds_of_their_own_have_the_distribution_of_whole_rollouts(folder):
    """Draws that are the same by construction would hide a state that is not: here they are others."""
    engine = engine_of(folder, block_size=2, stops=[], max_batch=500)
    how = Decoding(threshold=0.6, top_k=2, max_tokens=4, holds=True, partial_tokens=2)
    prompt, count = [9, 8, 7], 3000
    first = engine.generate([prompt] * count, range(count), how)
    assert {r.finish_reason for r in first} == {"unfinished"} and len(first[0].response_ids) == 3
    seeds = range(10**6, 10**6 + count)
    rollouts = engine.generate([prompt] * count, seeds, how, begun=first)
    assert {len(r.response_ids) for r in rollouts} == {5}
    value, freedom = chi_square(rollouts, engine.model, how, 2, engine.mask_id)
    assert freedom > 8
    assert value < freedom + 4 * (2 * freedom) ** 0.5
    print(f"chi-square {value:.1f} at {freedom} degrees of freedom")

    swapped = [first[i - 1] for i in range(count)]  # the negative control: first parts of one kind too often
    swapped = [s if len(set(s.steps)) == 1 else first[0] for s in swapped]
    biased = engine.generate([prompt] * count, seeds, how, begun=swapped)
    value, freedom = chi_square(biased, engine.model, how, 2, engine.mask_id)
    assert value > freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize(
    "how", [HOWS["sampled"], HOWS["dithered"], HOWS["cut"]], ids=["plain", "dither", "cut"]
)
def test_every_segment_has_the_log_probabilities_of_the_weights_that_drew_it(folder, how):
    """Three policies in turn; the trainer scores each segment with the weights that were kept for it."""
    how = dataclasses.replace(how, max_tokens=40, partial_tokens=9)
    engine, prompts, kept = engine_of(folder, stops=[]), prompts_of(16), []
    rollouts, ends = None, []
    for number in range(3):
        noise = torch.Generator().manual_seed(number)
        changed = {
            n: t + 0.02 * torch.randn(t.shape, generator=noise) for n, t in named_weights(engine.model)
        }
        engine.update_weights(changed.items())
        network = model.load(str(folder))
        network.load_state_dict(engine.model.state_dict())
        kept.append(network)
        if rollouts:
            grow_older([OpenGroup(0, 0, rollouts)], 1, 0)
        rollouts = engine.generate(prompts, range(16), how, begun=rollouts)
        ends.append([len(r.response_ids) for r in rollouts])
    views = [replay(r, BLOCK, 1.0, exact=how.holds) for r in rollouts]
    others = []
    for row in pack(views, BLOCK, engine.mask_id, 4096):
        assert set(row.ages.tolist()) == {0, 1, 2}
        with torch.no_grad():
            scores = torch.stack([network.score(row, how).logprobs for network in kept])
        own = scores.gather(0, 2 - row.ages[None])[0]
        assert (own - row.engine_logprobs).abs().max() < 1e-4
        others += (scores[2] - row.engine_logprobs)[row.ages > 0].abs().tolist()
        ages = [[2] * a + [1] * (b - a) + [0] * (c - b) for a, b, c in zip(*ends, strict=True)]
        token = row.positions[row.scored] - torch.tensor([len(prompts[i]) for i in row.source.tolist()])
        wanted = [ages[i][t] for i, t in zip(row.source.tolist(), token.tolist(), strict=True)]
        assert row.ages.tolist() == wanted
    assert max(others) > 0.1, "the weights did change"


# -------------------------------------------------------------------------------------- the loop

PARTIAL = SPEED | {"groups": 3, "group_size": 2, "max_rounds": 2, "max_tokens": 24, "partial_tokens": 6}
MOST_STEPS = 4  # that a rollout of 24 tokens can take


def record_made(monkeypatch) -> list[dipo.Group]:
    """All groups that are graded from now on, useful or not."""
    made, make_group = [], dipo.make_group

    def note(*arguments):
        made.append(make_group(*arguments))
        return made[-1]

    monkeypatch.setattr(dipo, "make_group", note)
    return made


def one_step(trainer: Trainer, engine, order: DataOrder, open_groups: list[OpenGroup]):
    parts = engine, trainer.model, trainer.tokenizer, QUESTIONS, order, trainer.config
    return collect_groups(*parts, open_groups)


def test_frozen_weights_give_the_groups_of_plain_rollouts(folder, tmp_path, monkeypatch):
    """Each question that is asked, its lengths and rewards: none is missing, whatever its length."""
    trainer = Trainer(configured(DiPOConfig, folder, tmp_path / "run", **PARTIAL))
    engine, order, open_groups = trainer.engine(), DataOrder(len(QUESTIONS), 0), []
    made, first_steps, ended_in = record_made(monkeypatch), {}, {}
    in_flight, figures = [], []
    for step in range(12):
        asked_before, made_before = order.cursor, len(made)
        _, of_step = one_step(trainer, engine, order, open_groups)
        figures.append(of_step)
        first_steps |= {number: step for number in range(asked_before, order.cursor)}
        ended_in |= {group.number: step for group in made[made_before:]}
        in_flight.append({group.number for group in open_groups})
        assert of_step["groups_asked"] == order.cursor - asked_before
        for group in open_groups:
            for rollout in group.rollouts:
                assert rollout.finish_reason != "unfinished" or len(rollout.response_ids) < 24

    # Every question of the first steps has ended, in time; what has not is still in flight.
    asked = set(range(order.cursor))
    assert set(ended_in) | in_flight[-1] == asked and not set(ended_in) & in_flight[-1]
    assert max(ended_in[n] - first_steps[n] for n in ended_in) <= MOST_STEPS - 1
    assert len({ended_in[n] - first_steps[n] for n in ended_in}) > 2, "some took one step, some several"
    per_step = [f["groups_asked"] for f in figures]
    bound = MOST_STEPS * trainer.config.groups * (1 + 4 * (trainer.config.max_rounds - 1))
    assert max(map(len, in_flight)) <= min(bound, MOST_STEPS * max(per_step))

    # They are what plain rollouts of the same questions are.
    early = [n for n in sorted(asked) if first_steps[n] < 12 - MOST_STEPS]
    trainer.config.partial_tokens = 0
    numbers = DataOrder(len(QUESTIONS), 0).take(order.cursor)
    parts = trainer.model, trainer.tokenizer, QUESTIONS
    plain = {g.number: g for g in sample_groups(engine, *parts, numbers, trainer.config)}
    found = {group.number: group for group in made[: len(ended_in)]}
    assert set(early) <= set(found)
    for number, group in found.items():
        ours, theirs = [g.rollout for g in group.graded], [g.rollout for g in plain[number].graded]
        assert_same_rollouts(ours, theirs)
        assert group.totals == plain[number].totals
        assert group.useful == plain[number].useful
    lengths = Counter(len(g.rollout.response_ids) for n in early for g in found[n].graded)
    wanted = Counter(len(g.rollout.response_ids) for n in early for g in plain[n].graded)
    assert lengths == wanted and len(lengths) > 3

    # The negative control: what ends in the step that asks it is short.
    at_once = [g.rollout for n in early if ended_in[n] == first_steps[n] for g in found[n].graded]
    assert max(len(r.response_ids) for r in at_once) < max(lengths)


def test_as_many_end_as_are_asked_and_about_as_many_are_useful_as_wanted(folder, tmp_path):
    settings = PARTIAL | {"groups": 6, "max_rounds": 3}
    trainer = Trainer(configured(DiPOConfig, folder, tmp_path / "run", **settings))
    engine, order, open_groups = trainer.engine(), DataOrder(len(QUESTIONS), 0), []
    figures = [one_step(trainer, engine, order, open_groups)[1] for _ in range(24)][4:]
    useful = sum(f["groups_kept"] for f in figures) / len(figures)
    asked = sum(f["groups_asked"] for f in figures)
    ended = sum(f["groups_kept"] / f["kept_rate"] for f in figures)
    assert 4 < useful < 9
    assert abs(asked - ended) < 0.15 * asked


def test_a_step_with_few_useful_groups_goes_on_with_those_that_are_open(folder, tmp_path):
    """Until half of what is wanted is there; not for more rounds of questions than a rollout can take."""
    settings = PARTIAL | {"partial_tokens": 4, "groups": 2, "max_rounds": 1}
    trainer = Trainer(configured(DiPOConfig, folder, tmp_path / "run", **settings))
    engine, order, open_groups, sizes = trainer.engine(), DataOrder(len(QUESTIONS), 0), [], []
    generate = engine.generate

    def note(prompts, *rest):
        sizes.append(len(prompts))
        return generate(prompts, *rest)

    engine.generate = note
    kept, figures = one_step(trainer, engine, order, open_groups)
    rounds = 24 // 4
    assert 1 < len(sizes) <= 2 * rounds and sizes[0] == 2 * trainer.config.group_size
    assert sizes[:rounds] == sorted(sizes[:rounds]), "new questions, while open groups go on"
    assert sizes[rounds:] == sorted(sizes[rounds:], reverse=True), "then fewer and fewer"
    assert kept and figures["groups_asked"] == 2 * min(len(sizes), rounds)


def test_the_first_steps_are_as_large_as_later_ones(folder, tmp_path):
    settings = PARTIAL | {"groups": 6, "max_rounds": 3}
    trainer = Trainer(configured(DiPOConfig, folder, tmp_path / "run", **settings))
    engine, order, open_groups = trainer.engine(), DataOrder(len(QUESTIONS), 0), []
    figures = [one_step(trainer, engine, order, open_groups)[1] for _ in range(6)]
    assert min(f["groups_kept"] for f in figures) >= 3


def test_a_step_fails_only_when_none_is_open_any_more(folder, tmp_path):
    settings = PARTIAL | {"rewards.speed": 0, "rewards.accuracy": 1, "max_rounds": 1, "groups": 2}
    trainer = Trainer(configured(DiPOConfig, folder, tmp_path / "run", **settings))
    engine, order, open_groups = trainer.engine(), DataOrder(len(QUESTIONS), 0), []
    asked = 2 * math.ceil(24 / trainer.config.partial_tokens)
    with pytest.raises(InputError, match=rf"no useful group among {asked} questions in \d+ rounds"):
        one_step(trainer, engine, order, open_groups)
    assert not open_groups and order.cursor == asked


def test_tokens_grow_older_and_groups_beyond_the_limit_are_dropped():
    def rollout(tokens, ages, reason="unfinished"):
        return Rollout([1] * 4, [2] * tokens, [1] * tokens, [0.0] * tokens, tokens, reason, ages=ages)

    groups = [
        OpenGroup(0, 0, [rollout(4, []), None]),
        OpenGroup(1, 1, [rollout(8, [3] * 4 + [0] * 4), rollout(4, [3] * 4, "stop")]),
        OpenGroup(2, 2, [rollout(4, [4] * 4, "stop"), rollout(8, [1] * 8)]),
    ]
    assert grow_older(groups, 2, 0) == {"groups_too_old": 0, "unfinished": 4}
    assert [r.ages for r in groups[1].rollouts] == [[5] * 4 + [2] * 4, [5] * 4]
    assert groups[0].rollouts[0].ages == [2] * 4 and groups[0].rollouts[1] is None
    assert grow_older(groups, 1, 6) == {"groups_too_old": 1, "unfinished": 3}
    assert [group.number for group in groups] == [0, 1]
    assert groups[0].unfinished == [0, 1] and groups[1].unfinished == [0]


# ------------------------------------------------------------------------------------ the training


def old_of(rollout: Rollout, nows: list[torch.Tensor], exact: bool) -> list[torch.Tensor]:
    """Of the actions in the order of test_dipo.action_logprobs: the engine's where they are older."""
    steps = [0] * len(rollout.prompt_ids) + rollout.steps
    old, n = [], len(rollout.prompt_ids)
    nows = iter(nows)
    for step in range(1, max(steps) + 1):
        begin = steps.index(step) // BLOCK * BLOCK
        block = range(begin, begin + BLOCK)
        number = len({steps[i] for i in block if 0 < steps[i] < step})
        for i in [i for i in block if steps[i] == step]:
            now = next(nows)
            old.append(torch.tensor(rollout.logprobs[i - n]) if rollout.ages[i - n] else now)
        for i in [i for i in block if steps[i] > step] if exact else []:
            now = next(nows)
            old.append(torch.tensor(rollout.hold_logprobs[i - n][number]) if rollout.ages[i - n] else now)
    return old


@pytest.mark.parametrize("correction", ["none", "truncate"])
@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("likelihood", ["tokens", "exact"])
def test_older_tokens_have_the_ratio_to_the_policy_that_drew_them(
    folder, tmp_path, likelihood, updates, correction
):
    """Against the loop over trajectories of test_dipo.py, with ratios that are clipped and not."""
    exact = likelihood == "exact"
    settings = {"likelihood": likelihood, "updates": updates, "group_size": 4, "correction": correction}
    settings |= {"partial_tokens": 4, "lr": 1e-4} | SPEED
    trainer = Trainer(configured(DiPOConfig, folder, tmp_path / "run", **settings))
    config, engine = trainer.config, trainer.engine()
    config.partial_tokens = 0
    parts = engine, trainer.model, trainer.tokenizer, QUESTIONS, [(i, i) for i in range(8)], config
    groups = [g for g in sample_groups(*parts) if g.useful][:3]
    config.partial_tokens = 4
    noise = torch.Generator().manual_seed(0)

    def moved(logprob: float) -> float:
        return logprob + 0.4 * torch.randn((), generator=noise).item()

    for group in groups:
        for g in group.graded:  # the first block is two steps old, or one; the last is new
            r = g.rollout
            own_blocks = [(len(r.prompt_ids) + t) // BLOCK for t in range(len(r.steps))]
            last = max(own_blocks)
            r.ages = [0 if b == last else 2 if b == own_blocks[0] else 1 for b in own_blocks]
            r.logprobs = [moved(x) if a else x for x, a in zip(r.logprobs, r.ages, strict=True)]
            if exact:
                pairs = zip(r.hold_logprobs, r.ages, strict=True)
                r.hold_logprobs = [[moved(x) if a else x for x in xs] for xs, a in pairs]
    network = model.load(str(folder))
    nows = logprobs_of(network, groups, trainer.mask_id, exact)
    old = [
        [old_of(g.rollout, of_one, exact) for g, of_one in zip(group.graded, of_group, strict=True)]
        for group, of_group in zip(groups, nows, strict=True)
    ]
    losses = [backward_by_hand(network, groups, config, trainer.mask_id, old)]
    metrics = trainer.dipo_step(groups)
    assert_same(trainer.gradients[0], gradients_of(network))
    if updates == 1:
        assert metrics["loss"] == pytest.approx(losses[0], abs=1e-5)
    assert metrics["clip_fraction"] > 0.02, "ratios of older tokens are clipped as usual"
    assert metrics["gap_max"] < 1e-4, "the gap is that of the tokens of this step"
    ages = [a for group in groups for g in group.graded for a in g.rollout.ages]
    assert metrics["age"] == pytest.approx(sum(ages) / len(ages)) and len(set(ages)) == 3
    if correction == "truncate":
        assert metrics["correction_ratio"] == pytest.approx(1, abs=1e-3)


def test_a_run_counts_and_logs_what_it_drops_for_age(folder, tmp_path, monkeypatch):
    trained_on, pack_rows = [], dipo.pack_groups

    def note(groups, *rest):
        trained_on[-1] += [age for group in groups for g in group.graded for age in g.rollout.ages]
        return pack_rows(groups, *rest)

    monkeypatch.setattr(dipo, "pack_groups", note)
    settings = PARTIAL | {"steps": 6, "partial_tokens": 4, "groups": 6, "max_rounds": 4, "max_tokens": 48}
    for name, limit in (("all", 0), ("young", 1)):
        trained_on.append([])
        dipo.main(configured(DiPOConfig, folder, tmp_path / name, **settings, max_age=limit))
    logs = {n: [r for _, r in read_records(tmp_path / n / "metrics.jsonl")] for n in ("all", "young")}
    assert sum(r["groups_too_old"] for r in logs["all"]) == 0
    assert sum(r["groups_too_old"] for r in logs["young"]) > 0
    assert max(trained_on[0]) > 1 and max(trained_on[1]) == 1
    assert max(r["gap_max"] for log in logs.values() for r in log) < 1e-4
    assert all(r["unfinished"] > 0 for r in logs["all"])


# ------------------------------------------------------------------------------------ checkpoints


def test_what_a_checkpoint_has_of_a_rollout_is_the_rollout(folder, tmp_path, monkeypatch):
    """Floats to the last bit, infinity too; read by as many ranks as wrote them, or by another number."""
    rng = random.Random(0)
    groups = [OpenGroup(n, n % 3, [random_rollout(rng, BLOCK), None]) for n in range(7)]
    for group in groups:
        rollout = group.rollouts[0]
        rollout.hold_bounds = [[math.inf] * len(x) for x in rollout.hold_bounds]
        rollout.logprobs = [torch.randn(()).item() for _ in rollout.logprobs]
        rollout.ages = [rng.randrange(3) for _ in rollout.steps]

    def rank(number: int, world: int) -> run_folder.RunFolder:
        found = run_folder.RunFolder.__new__(run_folder.RunFolder)
        found.rank, found.world, found._checkpoint = number, world, tmp_path
        return found

    shares = [groups[::2], groups[1::2], []]  # one rank has none
    for number, share in enumerate(shares):
        rank(number, 3)._save_unfinished(tmp_path, [dataclasses.asdict(group) for group in share])
    for number, share in enumerate(shares):
        assert read_groups(rank(number, 3).unfinished(), Rollout) == share
    for world in (1, 2, 4):
        found = [read_groups(rank(number, world).unfinished(), Rollout) for number in range(world)]
        assert sorted((g for share in found for g in share), key=lambda g: g.number) == groups
        assert [g.number for g in found[0]] == list(range(7))[::world]


# ------------------------------------------------------------------------------- how many questions


def test_without_open_groups_as_many_are_asked_as_are_missing_at_the_rate_so_far():
    rng = random.Random(0)
    for _ in range(200):
        wanted, ended = rng.randint(1, 40), rng.randint(1, 80)
        useful = rng.randint(0, ended)
        rate = max(max(useful, 1) / ended, 0.25)
        found = more_questions(wanted, ended, ended, useful)
        assert found == (math.ceil((wanted - useful) / rate) if useful < wanted else 0)
    assert more_questions(8, 0, 0, 0) == 8


@pytest.mark.parametrize(("share", "steps"), [(1.0, 1), (0.5, 3), (0.5, 1), (0.25, 4)])
def test_with_open_groups_as_many_end_as_are_asked(share, steps):
    """Every question takes so many steps, and this share of them is useful: wanted / share are asked."""
    wanted, in_flight, asked = 8, [0] * steps, 0
    for _ in range(3 * steps):
        ended = in_flight.pop(0)
        asked = more_questions(wanted, 0, 0, 0)
        for _ in range(20):  # rounds; what is asked in this step ends in a later one
            asked += more_questions(wanted, asked, ended, share * ended)
        in_flight.append(asked)
    assert asked == wanted / share
    assert more_questions(8, 8, 0, 0) == 0, "nothing has ended: as many as are wanted are on their way"
