"""Both training stages against loops that take one decision at a time.

The oracle of the gradients scores every view by itself: earlier blocks clean, the block as it was
seen, one forward without packing, and the loss added up action by action as the formulas say.
"""

import dataclasses
import json
import math
import random

import numpy as np
import pytest
import torch
from conftest import TINY, WORDS, Trainer, random_rollout, rollout_of
from data_rows import write_task

import dipo
import model
import sft
from dipo import (
    DiPOConfig,
    Group,
    accumulate_certainty,
    accumulate_gradients,
    action_weight,
    collect_groups,
    counted_steps,
    dipo_loss,
    group_advantages,
    make_group,
    pack_certainty,
    pack_groups,
    policy_sampling,
    sample_groups,
    score_rows,
    speed_credits,
    training_metrics,
)
from masking import HOLD, noise
from plumbing.checkpoint import named_weights, tiny
from plumbing.common import DataOrder, InputError, read_records
from plumbing.config import load_config
from plumbing.guard import NOTES, Guard
from plumbing.run_folder import RunFolder
from reward import Graded, Question, read_questions
from rollout import Rollout
from sft import Example, SFTConfig, read_examples

BLOCK = 4
DECODING = {"threshold": 0.5, "max_tokens": 10}  # of the rollouts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint; beside it the data files that a config has to name."""
    place = tmp_path_factory.mktemp("dipo")
    write_task(place)
    return tiny(place / "tiny", **TINY)


def configured(config_class, folder, out, **changes):
    """A config that clips no gradient unless asked for."""
    common = {"model": folder, "out": out, "lr": 1e-3, "max_grad_norm": 1e9, "steps": 10}
    if config_class is DiPOConfig:
        own = DECODING | {"data": folder.with_name("rl.jsonl")}
    else:
        own = {"data": folder.with_name("sft.jsonl")}
    overrides = [f"{k}={v}" for k, v in (common | own | changes).items()]
    return load_config(config_class, overrides)


def start(config_class, folder, out, **changes) -> Trainer:
    """A trainer with such a config; it keeps its gradients."""
    return Trainer(configured(config_class, folder, out, **changes))


def assert_same(found: dict, wanted: dict, tolerance: float = 1e-5) -> None:
    """Relative to the norm of each tensor, none of which is zero."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        error = (found[name] - tensor).norm() / tensor.norm()
        assert error < tolerance, f"{name}: off by {error:.1e}"


def gradients_of(network) -> dict:
    return {n: p.grad.clone() for n, p in network.named_parameters()}


# ------------------------------------------------------------------------------ one view at a time


class BlockCausal:
    """Attention by a mask written out pair by pair: a token sees its own and earlier blocks."""

    def __init__(self, length: int):
        blocks = [i // BLOCK for i in range(length)]
        self.seen = torch.tensor([[kv <= q for kv in blocks] for q in blocks])

    def attend(self, layer, q, k, v, scaling):
        share = q.shape[1] // k.shape[1]
        k, v = (torch.repeat_interleave(t, share, dim=1) for t in (k, v))
        weights = (q @ k.transpose(2, 3) * scaling).masked_fill(~self.seen, -torch.inf).softmax(-1)
        return (weights @ v).transpose(1, 2)


def probabilities(network, before: list[int], block: list[int]) -> torch.Tensor:
    """[B, V] at the tokens of `block`, after whole clean blocks."""
    ids = before + block
    hidden = network.model(
        input_ids=torch.tensor([ids]),
        position_ids=torch.arange(len(ids))[None],
        use_cache=False,
        attention=BlockCausal(len(ids)),
    ).last_hidden_state[0]
    return network.lm_head(hidden[-BLOCK:]).softmax(-1)


def action_logprobs(network, r: Rollout, mask_id: int, exact: bool):
    """log-probability of every action of a trajectory, one (block, step) after the other."""
    ids = r.prompt_ids + r.response_ids
    steps = [0] * len(r.prompt_ids) + r.steps
    found = []
    for step in range(1, max(steps) + 1):
        begin = steps.index(step) // BLOCK * BLOCK
        block = range(begin, begin + BLOCK)
        seen = [ids[i] if steps[i] < step else mask_id for i in block]
        p = probabilities(network, ids[:begin], seen)
        revealed = [p[i - begin, ids[i]] for i in block if steps[i] == step]
        found += [q.log() for q in revealed]
        least = min(q.item() for q in revealed)
        bound = DECODING["threshold"] if least >= DECODING["threshold"] else least
        if exact:
            for i in block:
                if steps[i] > step:
                    q = p[i - begin]
                    found.append(q[q.detach() < bound].sum().log())
    return found


# -------------------------------------------------------------------------------- formulas by hand


def rewarded(totals) -> list[dict[str, float]]:
    """Rewards with these totals."""
    return [{"accuracy": total} for total in totals]


def graded_response(correct: bool = False, tokens: int = BLOCK, answer: str | None = "1") -> Graded:
    """A graded rollout of that many tokens, a step for each."""
    rollout = rollout_of([1] * BLOCK, [2] * tokens)
    return Graded(rollout, Question("q", "1"), "", answer, correct, BLOCK)


def group_of(tokens: list[int]) -> Group:
    """A group of which only the lengths matter."""
    none = [0.0] * len(tokens)
    return Group(0, [graded_response(tokens=n) for n in tokens], rewarded(none), none, none)


def test_advantages_by_hand():
    totals = [1.0, 0.0, 0.0, 0.0]
    root = math.sqrt(3) / 4  # standard deviation of 1, 0, 0, 0
    config = DiPOConfig()
    wanted = [0.75 / root] + [-0.25 / root] * 3
    assert group_advantages(rewarded(totals), totals, config) == pytest.approx(wanted)
    config.advantage_std = False
    assert group_advantages(rewarded(totals), totals, config) == pytest.approx([0.75, -0.25, -0.25, -0.25])


def test_advantages_without_spread_are_zero():
    for config in (DiPOConfig(), DiPOConfig(advantage_std=False)):
        assert group_advantages(rewarded([0.3] * 3), [0.3] * 3, config) == [0, 0, 0]
        assert any(group_advantages(rewarded([0.3, 0.3, 0.4]), [0.3, 0.3, 0.4], config))
        assert not make_group(0, [graded_response(False)] * 3, config).useful
        assert make_group(0, [graded_response(c) for c in (False, False, True)], config).useful


@pytest.mark.parametrize(
    ("verdicts", "boxes", "spread", "correctness"),
    [
        ((True, False), (True, True), True, True),
        ((False, False), (True, False), True, False),  # the rewards differ, and both are wrong
        ((True, True), (True, False), True, False),
        ((False, False), (True, True), False, False),
        ((True, False), (False, True), False, True),  # 1 + 0 = 0 + 1: verdicts differ, rewards do not
    ],
)
def test_groups_are_useful_by_spread_or_by_correctness(verdicts, boxes, spread, correctness):
    pairs = zip(verdicts, boxes, strict=True)
    graded = [graded_response(c, answer="1" if box else None) for c, box in pairs]
    for keep, wanted in (("spread", spread), ("correctness", correctness)):
        config = DiPOConfig(rewards={"accuracy": 1.0, "boxed": 10.0}, keep_groups=keep)
        assert make_group(0, graded, config).useful is wanted


def test_advantages_of_each_reward_separately():
    rewards = [{"accuracy": a, "speed": s} for a, s in ((1, 3), (1, 1), (1, 2), (1, 2))]
    weights = {"accuracy": 5.0, "speed": 0.5}
    totals = [sum(weights[n] * r[n] for n in weights) for r in rewards]
    config = DiPOConfig(rewards=weights, normalize_each=True)
    # accuracy has no spread and adds nothing; speed: mean 2, standard deviation sqrt(1/2)
    wanted = [0.5 * math.sqrt(2) * d for d in (1, -1, 0, 0)]
    assert group_advantages(rewards, totals, config) == pytest.approx(wanted)


def test_a_group_holds_what_became_of_its_rollouts():
    graded = [graded_response(True, 8), graded_response(False, 4), graded_response(False, 4, answer=None)]
    config = DiPOConfig(rewards={"accuracy": 2.0, "boxed": 5.0})
    group = make_group(7, graded, config)
    assert group.number == 7 and group.graded == graded and group.trajectory_tokens == 16
    assert [r["accuracy"] for r in group.rewards] == [1, 0, 0]
    assert [r["boxed"] for r in group.rewards] == [0.1, 0.1, 0]
    assert group.totals == pytest.approx([2.5, 0.5, 0.0])
    root = math.sqrt((1.5**2 + 0.5**2 + 1) / 3)  # standard deviation of 2.5, 0.5, 0
    assert group.advantages == pytest.approx([1.5 / root, -0.5 / root, -1 / root])


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_loss_is_the_formula_action_by_action(beta):
    low, high = 0.2, 0.28
    config = DiPOConfig(clip_low=low, clip_high=high, kl_beta=beta)
    ratios = [0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 2.0]
    cases = [(ratio, a) for ratio in ratios for a in (1.5, -0.7, 0.0)]
    rng = np.random.default_rng(0)
    old, reference = -3 * rng.random(len(cases)), -3 * rng.random(len(cases))
    weights = 0.1 + rng.random(len(cases))
    loss = slope_sum = clipped = policy_kl = kl = 0.0
    slopes = []
    for (ratio, a), l_old, l_ref, w in zip(cases, old, reference, weights, strict=True):
        l_new = l_old + math.log(ratio)
        bounded = min(max(ratio, 1 - low), 1 + high)
        loss -= w * min(ratio * a, bounded * a)
        is_clipped = (a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low)
        slope = 0.0 if is_clipped else -w * ratio * a
        clipped += is_clipped
        policy_kl += ratio - math.log(ratio) - 1
        if beta:
            other = math.exp(l_ref - l_new)
            kl += other - (l_ref - l_new) - 1
            loss += beta * w * (other - (l_ref - l_new) - 1)
            slope += beta * w * (1 - other)
        slopes.append(slope)
        slope_sum += slope
    tensors = [torch.tensor(x, dtype=torch.double) for x in (old, [a for _, a in cases], weights)]
    log_ratio = torch.tensor([math.log(r) for r, _ in cases], dtype=torch.double)
    logprobs = (tensors[0] + log_ratio).requires_grad_()
    found, sums = dipo_loss(logprobs, *tensors, config, torch.tensor(reference) if beta else None)
    found.backward()
    assert found.item() == pytest.approx(loss)
    assert logprobs.grad.tolist() == pytest.approx(slopes, abs=1e-12)
    assert sums["clipped"] == clipped == 4
    assert sums["policy_kl"].item() == pytest.approx(policy_kl)
    assert ("kl" in sums) == bool(beta)
    if beta:
        assert sums["kl"].item() == pytest.approx(kl)


@pytest.mark.parametrize(("bound", "ratios", "slopes"), [
    (0.0, [math.exp(-3), 1.2, math.exp(3)], [-math.exp(-3), -1.2, -math.exp(3)]),
    (2.0, [math.exp(-2), 1.2, math.exp(2)], [0.0, -1.2, 0.0]),
])  # fmt: skip
def test_clamped_log_ratios_have_no_gradient(bound, ratios, slopes):
    config = DiPOConfig(clip_low=1e9, clip_high=1e9, log_ratio_clamp=bound)  # nothing else is clipped
    old, ones = torch.zeros(3, dtype=torch.double), torch.ones(3, dtype=torch.double)
    logprobs = torch.tensor([-3.0, math.log(1.2), 3.0], dtype=torch.double, requires_grad=True)
    loss, _ = dipo_loss(logprobs, old, ones, ones, config)
    loss.backward()
    assert loss.item() == pytest.approx(-sum(ratios))
    assert logprobs.grad.tolist() == pytest.approx(slopes)


def test_the_policy_that_is_trained_is_cut_like_the_one_sampled_from_or_not_at_all():
    settings = {"temperature": 0.7, "top_k": 50, "top_p": 0.9}
    sampled = policy_sampling(DiPOConfig(**settings))
    softmax = policy_sampling(DiPOConfig(**settings, train_on="softmax"))
    assert (sampled.temperature, sampled.top_k, sampled.top_p) == (0.7, 50, 0.9)
    assert (softmax.temperature, softmax.top_k, softmax.top_p) == (0.7, 0, 1.0)


def test_weights_are_the_three_normalisers():
    lengths = [[4, 8, 12], [20, 4, 4]]
    groups = [group_of(tokens) for tokens in lengths]
    value = {(g, i): 1.0 + g + 0.3 * i for g in range(2) for i in range(3)}  # of each of its tokens
    direct = {
        "group": sum(
            sum(n * value[g, i] for i, n in enumerate(tokens)) / sum(tokens)
            for g, tokens in enumerate(lengths)
        )
        / 2,
        "batch": sum(n * value[g, i] for g, t in enumerate(lengths) for i, n in enumerate(t)) / 52,
        "sequence": sum(value.values()) / 6,
    }
    assert len({round(v, 6) for v in direct.values()}) == 3
    for normalizer, wanted in direct.items():
        config = DiPOConfig(normalizer=normalizer, group_size=3)
        total = sum(
            n * value[g, i] * action_weight(config, groups[g], n, all_groups=2, all_tokens=52)
            for g, tokens in enumerate(lengths)
            for i, n in enumerate(tokens)
        )
        assert total == pytest.approx(wanted), normalizer


# ----------------------------------------------------------------------------------- collect_groups

QUESTIONS = [Question(f"{i}+{i + 3}?", str(2 * i + 3)) for i in range(40)]
SPEED = {"rewards.accuracy": 0, "rewards.speed": 1.0}


def test_collecting_goes_on_until_enough_groups_are_useful(folder, tmp_path):
    # Two rollouts of a question are often equally fast; such groups are no use.
    settings = SPEED | {"groups": 6, "group_size": 2, "max_rounds": 20}
    trainer = start(DiPOConfig, folder, tmp_path / "run", **settings)
    config, engine = trainer.config, trainer.engine()
    order = DataOrder(len(QUESTIONS), config.seed)
    kept, figures = collect_groups(engine, trainer.model, trainer.tokenizer, QUESTIONS, order, config, [])

    again = DataOrder(len(QUESTIONS), config.seed).take(order.cursor)
    everything = sample_groups(engine, trainer.model, trainer.tokenizer, QUESTIONS, again, config)
    useful = [max(g.totals) - min(g.totals) > 1e-6 for g in everything]
    assert [g.number for g in kept] == [i for i in range(len(useful)) if useful[i]]
    for found, again in zip(kept, (g for g in everything if g.useful), strict=True):
        assert found.totals == pytest.approx(again.totals)
        assert [g.rollout.response_ids for g in found.graded] == [
            g.rollout.response_ids for g in again.graded
        ]
    asked, rounds = 0, 0
    while sum(useful[:asked]) < 6:  # as many more as are missing at the rate so far
        rate = max(max(sum(useful[:asked]), 1) / asked, 0.25) if asked else 1.0
        asked += math.ceil((6 - sum(useful[:asked])) / rate)
        rounds += 1
    assert order.cursor == asked == figures["groups_asked"]
    assert rounds > 1, "the first round should not have sufficed, or the test shows nothing"
    assert figures["groups_kept"] == len(kept) >= 6
    totals = [t for g in everything for t in g.totals]
    assert figures["reward"] == pytest.approx(sum(totals) / len(totals))
    rollouts = [g.rollout for group in everything for g in group.graded]
    steps = sum(r.num_steps for r in rollouts)
    assert figures["tpf"] == pytest.approx(sum(len(r.response_ids) for r in rollouts) / steps)
    shown = sum(r.num_tokens for r in rollouts)
    assert figures["response_tokens"] == pytest.approx(shown / len(rollouts))


def test_collecting_ends_when_nothing_is_useful(folder, tmp_path):
    trainer = start(DiPOConfig, folder, tmp_path / "run", groups=2, group_size=2, max_rounds=3)
    config, engine = trainer.config, trainer.engine()
    order = DataOrder(len(QUESTIONS), config.seed)
    with pytest.raises(InputError, match="no useful group among 14 questions in 3 rounds"):
        collect_groups(engine, trainer.model, trainer.tokenizer, QUESTIONS, order, config, [])
    assert order.cursor == 2 + 4 + 8, "as many as are missing at the rate so far, at most four times"


# ------------------------------------------------------------------------------- a step of training


@pytest.fixture(scope="module")
def groups(folder, tmp_path_factory) -> list[Group]:
    """Real rollouts, rewarded by speed: some useful groups, of different lengths."""
    out = tmp_path_factory.mktemp("groups") / "run"
    trainer = start(DiPOConfig, folder, out, group_size=4, likelihood="exact", **SPEED)
    asked = [(i, i) for i in range(8)]
    sampled = sample_groups(
        trainer.engine(), trainer.model, trainer.tokenizer, QUESTIONS, asked, trainer.config
    )
    useful = [g for g in sampled if g.useful]
    assert len(useful) >= 3
    return useful[:3]


def logprobs_of(network, groups, mask_id, exact):
    """By group, trajectory and action, without gradient."""
    with torch.no_grad():
        return [[action_logprobs(network, g.rollout, mask_id, exact) for g in gr.graded] for gr in groups]


def backward_by_hand(network, groups, config, mask_id, old=None, reference=None) -> float:
    """The loss, its gradient added to the network's; `old` and `reference` as from logprobs_of."""
    exact, total = config.likelihood == "exact", 0.0
    all_tokens = sum(len(g.rollout.response_ids) for group in groups for g in group.graded)
    for i, group in enumerate(groups):
        mean = sum(group.totals) / len(group.totals)
        std = math.sqrt(sum((t - mean) ** 2 for t in group.totals) / len(group.totals))
        group_tokens = sum(len(g.rollout.response_ids) for g in group.graded)
        for k, graded in enumerate(group.graded):
            advantage = (group.totals[k] - mean) / std
            weight = {
                "group": 1 / group_tokens / len(groups),
                "batch": 1 / all_tokens,
                "sequence": 1 / len(graded.rollout.response_ids) / len(group.graded) / len(groups),
            }[config.normalizer]
            loss = 0.0
            for n, now in enumerate(action_logprobs(network, graded.rollout, mask_id, exact)):
                then = old[i][k][n] if old else now.detach()
                ratio = (now - then).exp()
                bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
                loss = loss - weight * min(ratio * advantage, bounded * advantage)
                if reference:
                    other = reference[i][k][n] - now
                    loss = loss + config.kl_beta * weight * (other.exp() - other - 1)
            loss.backward()
            total += loss.item()
    return total


@pytest.mark.parametrize("likelihood", ["tokens", "exact"])
@pytest.mark.parametrize("normalizer", ["group", "batch", "sequence"])
def test_gradient_is_that_of_a_loop_over_trajectories(folder, tmp_path, groups, likelihood, normalizer):
    settings = {"likelihood": likelihood, "normalizer": normalizer, "group_size": 4}
    trainer = start(DiPOConfig, folder, tmp_path / "run", **settings)
    network = model.load(str(folder))
    loss = backward_by_hand(network, groups, trainer.config, trainer.mask_id)
    metrics = trainer.dipo_step(groups)
    assert metrics["loss"] == pytest.approx(loss, abs=1e-6)
    assert_same(trainer.gradients[0], gradients_of(network))
    assert metrics["gap_max"] < 1e-4
    assert metrics["clip_fraction"] == 0
    assert (metrics["hold_fraction"] > 0) == (likelihood == "exact")
    norm = math.sqrt(sum(g.square().sum().item() for g in trainer.gradients[0].values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("likelihood", ["tokens", "exact"])
def test_gradient_does_not_depend_on_packing_or_order(folder, tmp_path, groups, likelihood):
    found, num_rows = [], []
    for name, budget, order in (("a", 64, groups), ("b", 100000, groups), ("c", 150, groups[::-1])):
        settings = {"likelihood": likelihood, "group_size": 4, "token_budget": budget}
        trainer = start(DiPOConfig, folder, tmp_path / name, **settings)
        num_rows.append(len(pack_groups(order, trainer.config, BLOCK, trainer.mask_id)))
        metrics = trainer.dipo_step(order)
        found.append((metrics, trainer.gradients[0]))
    assert num_rows[0] > num_rows[2] > num_rows[1] == 1
    for metrics, gradients in found[1:]:
        assert_same(gradients, found[0][1])
        for name in ("loss", "entropy", "hold_fraction", "policy_kl", "train_tokens"):
            assert metrics[name] == pytest.approx(found[0][0][name], abs=1e-6), name


def test_several_updates_go_by_the_policy_before_the_first(folder, tmp_path, groups):
    settings = {"updates": 3, "group_size": 4, "token_budget": 150, "lr": 2e-3, "kl_beta": 0.05}
    trainer = start(DiPOConfig, folder, tmp_path / "run", **settings)
    config, mask_id = trainer.config, trainer.mask_id
    reference = tiny(tmp_path / "reference", seed=1, **TINY)
    reference = model.load(str(reference)).requires_grad_(False)
    network = model.load(str(folder))
    betas = (config.adam_beta1, config.adam_beta2)
    adam = torch.optim.AdamW(network.parameters(), lr=config.lr, betas=betas, weight_decay=0)
    old, refs = (logprobs_of(m, groups, mask_id, False) for m in (network, reference))

    metrics = trainer.dipo_step(groups, reference)
    losses = []
    for update in range(3):
        losses.append(backward_by_hand(network, groups, config, mask_id, old, refs))
        # Adam magnifies rounding where a gradient is nearly zero, so later gradients agree less.
        assert_same(trainer.gradients[update], gradients_of(network), 1e-5 if update == 0 else 5e-3)
        adam.step()
        adam.zero_grad()
    assert metrics["loss"] == pytest.approx(sum(losses) / 3, rel=1e-3)
    assert metrics["clip_fraction"] > 0, "after two updates some ratios have left the clip range"
    assert metrics["policy_kl"] > 0 and metrics["kl"] > 0


def test_an_update_makes_the_rewarded_trajectories_likelier(folder, tmp_path, groups):
    trainer = start(DiPOConfig, folder, tmp_path / "run", group_size=4, likelihood="exact")

    def value():
        logprobs = logprobs_of(trainer.model, groups, trainer.mask_id, True)
        return sum(
            a * sum(of_trajectory)
            for group, of_group in zip(groups, logprobs, strict=True)
            for a, of_trajectory in zip(group.advantages, of_group, strict=True)
        )

    before = value()
    trainer.dipo_step(groups)
    assert value() > before


# ---------------------------------------------------------------------------------------------- SFT


def examples(sizes=((3, 9), (8, 8), (1, 15), (6, 2), (10, 10))) -> list[Example]:
    rng = np.random.default_rng(0)
    return [Example(rng.integers(0, 250, p + r).tolist(), p) for p, r in sizes]


def sft_by_hand(network, batch, config, mask_id) -> float:
    """- 1/R sum over views / number of views, over masked i, 1/t log p(x_i | view)."""
    response_tokens, total = sum(len(e.ids) - e.prompt_tokens for _, e in batch), 0.0
    for number, e in batch:
        rng = np.random.default_rng([config.seed, 1, number])
        noised = noise(
            e.ids, e.prompt_tokens, BLOCK, rng, config.noise_per, config.views,
            config.complementary, config.t_min, config.t_max,
        )  # fmt: skip
        for block, masked, weights in zip(noised.block.tolist(), noised.masked, noised.weights, strict=True):
            begin = block * BLOCK
            ids = e.ids[begin : begin + BLOCK]
            seen = [mask_id if m else i for i, m in zip(ids, masked, strict=True)]
            p = probabilities(network, e.ids[:begin], seen)
            loss = 0.0
            for j in range(BLOCK):
                if masked[j]:
                    assert begin + j >= e.prompt_tokens, "a prompt is never masked"
                    loss = loss - float(weights[j]) * p[j, ids[j]].log() / response_tokens
            loss.backward()
            total += loss.item()
    return total


@pytest.mark.parametrize(
    "noising",
    [
        {},
        {"noise_per": "block", "views": 2},
        {"views": 4, "complementary": "true", "noise_per": "block"},
    ],
)
def test_sft_step_is_a_loop_over_views(folder, tmp_path, noising):
    batch = list(enumerate(examples(), start=7))
    found = []
    for budget in (30, 100000):
        trainer = start(SFTConfig, folder, tmp_path / str(budget), token_budget=budget, **noising)
        found.append((trainer.sft_step(batch), trainer.gradients[0]))
    network = model.load(str(folder))
    loss = sft_by_hand(network, batch, trainer.config, trainer.mask_id)
    for metrics, gradients in found:
        assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
        assert_same(gradients, gradients_of(network))
    moved = dict(trainer.model.named_parameters())
    assert all(not torch.equal(p, moved[n]) for n, p in network.named_parameters()), "it stepped"


def test_the_last_block_is_filled_and_its_filling_is_trained(folder, tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "1+2?"}, {"role": "assistant", "content": "3"}]
    records = [{"messages": turns}, {"prompt": "ab", "response": "cd<|im_end|>"}]
    records.append({"prompt": "abc", "response": "defg"})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    pad, end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    chat, *others = read_examples(str(path), tokenizer, 8, 64)
    text = "<|im_start|>user\n1+2?<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer(text)["input_ids"]
    ids = prompt + tokenizer("3")["input_ids"] + [end]
    assert chat == Example(ids + [pad] * (-len(ids) % 8), len(prompt), f"{path}:1")
    abcdefg = tokenizer("abcdefg")["input_ids"]
    # an end that is there already is not doubled, and a full block gets no filling
    assert others[0] == Example(abcdefg[:4] + [end] + [pad] * 3, 2, f"{path}:2")
    assert others[1] == Example(abcdefg + [end], 3, f"{path}:3")

    scored = np.zeros(8, int)
    for number in range(200):
        views = noise(others[0].ids, 2, 8, np.random.default_rng(number))
        scored += views.is_scored.sum(0)
        clean = np.broadcast_to(views.ids, (len(views.block), 8))
        assert (views.targets[views.is_scored] == clean[views.is_scored]).all()
    assert (scored[:2] == 0).all() and (scored[2:] > 60).all()


def test_settings_of_the_loss_reach_it(folder, tmp_path, groups):
    """KL to a reference, and the temperature of the policy, change the gradient as they should."""
    reference = tiny(tmp_path / "reference", seed=1, **TINY)
    reference = model.load(str(reference)).requires_grad_(False)
    found = {}
    for name, beta, temperature in (("plain", 0, 1.0), ("kl", 0.5, 1.0), ("warm", 0, 1.3)):
        settings = {"group_size": 4, "kl_beta": beta, "temperature": temperature}
        trainer = start(DiPOConfig, folder, tmp_path / name, **settings)
        trainer.dipo_step(groups, reference if beta else None)
        found[name] = trainer.gradients[0]["lm_head.weight"]
    for name in ("kl", "warm"):
        assert (found[name] - found["plain"]).norm() > 0.01 * found["plain"].norm(), name


# ---------------------------------------------------------------------------------------- the loops


def assert_same_run(out, trainer: Trainer, figures: list[dict]) -> None:
    """The run in `out` logged these figures and ended with the trainer's weights, bit by bit."""
    logged = [record for _, record in read_records(out / "metrics.jsonl")]
    assert [{name: record[name] for name in figures[0]} for record in logged] == figures
    saved = dict(model.load(out / "latest").named_parameters())
    assert all(torch.equal(p, saved[n]) for n, p in trainer.model.named_parameters())


SCHEDULE = {"steps": 3, "schedule": "cosine", "warmup_steps": 2, "max_grad_norm": 0.5}


def test_the_loop_of_sft_makes_these_steps(folder, tmp_path):
    settings = SCHEDULE | {"batch_size": 5}
    trainer = start(SFTConfig, folder, tmp_path / "by-hand", **settings)
    data = read_examples(trainer.config.data, trainer.tokenizer, BLOCK, 1024)
    order, figures = DataOrder(len(data), trainer.config.seed), []
    for _ in range(3):
        figures.append(trainer.sft_step([(number, data[index]) for number, index in order.take(5)]))
        trainer.step += 1
    sft.main(configured(SFTConfig, folder, tmp_path / "run", **settings))
    assert_same_run(tmp_path / "run", trainer, figures)


def test_the_loop_of_dipo_makes_these_steps(folder, tmp_path):
    settings = SCHEDULE | SPEED | {"groups": 2, "group_size": 4, "updates": 2, "kl_beta": 0.1}
    trainer = start(DiPOConfig, folder, tmp_path / "by-hand", **settings)
    reference = model.load(str(folder)).requires_grad_(False)
    questions = read_questions(trainer.config.data)
    engine, order = trainer.engine(), DataOrder(len(questions), trainer.config.seed)
    figures = []
    for _ in range(3):
        groups, sampled = collect_groups(
            engine, trainer.model, trainer.tokenizer, questions, order, trainer.config, []
        )
        figures.append(sampled | trainer.dipo_step(groups, reference))
        engine.update_weights(named_weights(trainer.model))
        trainer.step += 1
    dipo.main(configured(DiPOConfig, folder, tmp_path / "run", **settings))
    assert_same_run(tmp_path / "run", trainer, figures)


# ------------------------------------------------------------------- holds that engine and trainer dispute


def test_a_disputed_hold_does_not_dominate_the_gradient(folder, tmp_path, groups, monkeypatch):
    """Engine: a sure hold. Trainer: all but impossible, as when two sure positions change their order."""
    trainer = start(DiPOConfig, folder, tmp_path / "run", group_size=4, likelihood="exact")
    packs = pack_groups(groups, trainer.config, BLOCK, trainer.mask_id)

    def gradient_norm() -> tuple[float, float]:
        rows = score_rows(packs, trainer.model, None, trainer.config)
        stats = accumulate_gradients(trainer.model, rows, trainer.config, first_update=True)
        norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1e9).item()
        trainer.optimizer.zero_grad()
        return norm, training_metrics(stats, trainer.config)["gap_holds"]

    agreed, gap = gradient_norm()
    assert gap < 1e-3
    for packed in packs:
        held = packed.targets == HOLD
        packed.bounds[held], packed.engine_logprobs[held] = -9.0, -0.01
        packed.weights[held] *= 10  # many of them
    disputed, gap = gradient_norm()
    assert gap > 0.9
    monkeypatch.setattr(dipo, "correction_weights", lambda trainer, *_: torch.ones_like(trainer))
    dominated, _ = gradient_norm()
    assert dominated > 5 * agreed, "the negative control"
    assert disputed < 1.5 * agreed


# -------------------------------------------------------------------------------- credit for speed


def verdict(rollout: Rollout, correct: bool) -> Graded:
    return Graded(rollout, Question("q", "1"), "", "1", correct, BLOCK)


def credits_by_brute_force(graded: list[Graded], per: str, unit: float) -> list[list[float]]:
    """Sets of the steps that count, token by token; `unit` is what one step is worth."""

    def counted(g: Graded, t: int) -> int:
        prompt, found = len(g.rollout.prompt_ids), set()
        block = (prompt + t) // BLOCK
        for other, step in enumerate(g.rollout.steps):
            its_block = (prompt + other) // BLOCK
            later = its_block > block and per == "answer"
            before = its_block == block and (per != "position" or step <= g.rollout.steps[t])
            if later or before:
                found.add(step)
        return len(found)

    credits = []
    for i, g in enumerate(graded):
        row = []
        for t in range(len(g.rollout.steps)):
            others = [
                counted(o, t)
                for j, o in enumerate(graded)
                if i != j and o.correct and t < len(o.rollout.steps)
            ]
            saved = sum(others) / len(others) - counted(g, t) if g.correct and others else 0.0
            row.append(unit * saved)
        credits.append(row)
    return credits


@pytest.mark.parametrize("by_std", [True, False])
@pytest.mark.parametrize("per", ["answer", "block", "position"])
def test_speed_credits_against_brute_force(per, by_std):
    """Of answers of different lengths, some wrong, after prompts that end inside a block or not."""
    rng, lone_tokens, nonzero = random.Random(per), 0, 0
    for prompt in (4, 5, 7, 10):
        for _ in range(5):
            rollouts = [random_rollout(rng, BLOCK, prompt) for _ in range(6)]
            graded = [verdict(r, rng.random() < 0.7) for r in rollouts]
            right = [len(set(g.rollout.steps)) for g in graded if g.correct]
            config = DiPOConfig(speed_credit=0.3, credit_per=per, advantage_std=by_std)
            found = speed_credits(graded, config)
            unit = 0.3
            if by_std:
                mean = sum(right) / max(len(right), 1)
                std = math.sqrt(sum((n - mean) ** 2 for n in right) / max(len(right), 1))
                unit = 0.3 / std if std else 0.0
            wanted = credits_by_brute_force(graded, per, unit)
            assert len(found) == len(wanted)
            for ours, theirs in zip(found, wanted, strict=True):
                assert ours == pytest.approx(theirs)
            longest = sorted(len(g.rollout.steps) for g in graded if g.correct)[-2:]
            lone_tokens += len(longest) == 2 and longest[1] - longest[0]
            nonzero += sum(map(any, found))
    assert lone_tokens > 0 and nonzero > 20, "the cases that were to be covered"


def test_speed_credits_by_hand():
    """The prompt's tail opens the first block: 2 tokens of it, then one block more."""
    fast = Rollout([1, 2], [3] * 6, [1, 1, 2, 2, 2, 3], [], 6, "stop")
    slow = Rollout([1, 2], [3] * 6, [2, 1, 3, 4, 5, 6], [], 6, "stop")
    counts = {"answer": [3, 3, 2, 2, 2, 2], "block": [1, 1, 2, 2, 2, 2], "position": [1, 1, 1, 1, 1, 2]}
    wanted = {"answer": [3, 3, 2, 2, 2, 2], "block": [1, 1, 2, 2, 2, 2], "position": [1, 0, 0, 1, 2, 2]}
    for per, saved in wanted.items():
        assert counted_steps(fast, BLOCK, per) == counts[per]
        config = DiPOConfig(speed_credit=1.0, credit_per=per)  # the standard deviation of 3 and 6 is 1.5
        graded = [verdict(fast, True), verdict(slow, True), verdict(fast, False)]
        found = speed_credits(graded, config)
        assert found[0] == pytest.approx([x / 1.5 for x in saved]), per
        assert found[1] == pytest.approx([-x / 1.5 for x in saved]), per
        assert found[2] == [0] * 6


@pytest.mark.parametrize("per", ["answer", "block", "position"])
def test_nothing_to_compare_has_no_credit(per):
    rng = random.Random(1)
    rollouts = [random_rollout(rng, BLOCK, 5, blocks=3) for _ in range(3)]
    config = DiPOConfig(speed_credit=1.0, credit_per=per)
    for verdicts in ((True, False, False), (False, False, False)):
        graded = [verdict(r, c) for r, c in zip(rollouts, verdicts, strict=True)]
        assert not any(map(any, speed_credits(graded, config)))
    # Right ones of equal speed: 4 steps in another order, while the wrong one is faster.
    pair = [Rollout([1] * 4, [2] * 8, steps, [], 8, "stop") for steps in ([1] * 4 + [2, 3, 4, 4],
            [1, 2, 3, 3] + [4] * 4, [1] * 4 + [2] * 4)]  # fmt: skip
    graded = [verdict(r, c) for r, c in zip(pair, (True, True, False), strict=True)]
    assert not any(map(any, speed_credits(graded, config)))


def test_credits_are_added_to_the_advantages_token_by_token():
    rng = random.Random(2)
    graded = [verdict(random_rollout(rng, BLOCK, 6, blocks=3), c) for c in (True, True, False)]
    config = DiPOConfig(speed_credit=0.5, credit_per="position", group_size=3, likelihood="exact")
    group = make_group(0, graded, config)
    assert any(group.credits[0]) and any(group.credits[1]) and not any(group.credits[2])
    (packed,) = pack_groups([group], config, BLOCK, WORDS)
    positions, source = packed.positions[packed.scored] - 6, packed.source
    wanted = [group.advantages[i] + group.credits[i][t] for i, t in zip(source, positions, strict=True)]
    assert packed.advantages.tolist() == pytest.approx(wanted)
    assert bool((packed.targets == HOLD).any())


@pytest.mark.parametrize(
    ("verdicts", "steps", "spread", "kept"),
    [
        ((True, True), (3, 8), 1.6, True),  # TPF 8 / 3 and 1
        ((True, True), (3, 8), 1.7, False),
        ((True, True), (4, 4), 0.01, False),
        ((False, False), (3, 8), 0.01, False),
        ((True, False), (4, 4), 9.0, True),  # the verdicts differ
        ((False, False), (3, 8), 0.0, True),  # off
    ],
)
def test_groups_of_one_verdict_need_a_spread_of_tpf(verdicts, steps, spread, kept):
    maps = {3: [1, 1, 1, 1, 2, 2, 3, 3], 4: [1, 1, 2, 2, 3, 3, 4, 4], 8: list(range(1, 9))}
    graded = []
    for correct, count, box in zip(verdicts, steps, ("1", None), strict=True):  # the rewards differ
        rollout = Rollout([1] * 4, [2] * 8, maps[count], [], 8, "stop")
        graded.append(dataclasses.replace(verdict(rollout, correct), answer=box))
    config = DiPOConfig(rewards={"accuracy": 1.0, "boxed": 1.0}, least_tpf_spread=spread)
    assert make_group(0, graded, config).useful is kept
    by_verdict = dataclasses.replace(config, keep_groups="correctness")
    assert make_group(0, graded, by_verdict).useful is (verdicts == (True, False))


def test_groups_with_credits_or_right_answers_are_useful():
    fast, slow = Rollout([1] * 4, [2] * 4, [1] * 4, [], 4, "stop"), rollout_of([1] * 4, [2] * 4)
    both = [verdict(fast, True), verdict(slow, True)]
    assert not make_group(0, both, DiPOConfig()).useful
    assert make_group(0, both, DiPOConfig(speed_credit=0.1)).useful
    for correct, useful in ((True, True), (False, False)):
        same = [verdict(slow, correct)] * 2
        assert not make_group(0, same, DiPOConfig(speed_credit=0.1)).useful
        assert make_group(0, same, DiPOConfig(certainty=0.1)).useful is useful


@pytest.mark.parametrize(
    "changes",
    [{"likelihood": "tokens"}, {"rule": "static"}, {"dither": 0.9, "threshold": 0.8}],
    ids=str,
)
def test_dither_is_refused_where_it_means_nothing(folder, tmp_path, changes):
    settings = {"dither": 0.3, "likelihood": "exact"}
    assert configured(DiPOConfig, folder, tmp_path, **settings).dither == 0.3
    with pytest.raises(InputError, match="config key dither"):
        configured(DiPOConfig, folder, tmp_path, **(settings | changes))


# ------------------------------------------------------------------------- certainty on right answers


def judged(groups: list[Group], verdicts: list[list[bool]]) -> list[Group]:
    """The same rollouts with these verdicts: a random checkpoint is never right."""
    changed = []
    for group, of_group in zip(groups, verdicts, strict=True):
        pairs = zip(group.graded, of_group, strict=True)
        graded = [dataclasses.replace(g, correct=correct) for g, correct in pairs]
        changed.append(dataclasses.replace(group, graded=graded))
    return changed


VERDICTS = [[True, False, True, True], [False] * 4, [False, True, True, False]]


def certainty_by_hand(network, groups, config, mask_id) -> float:
    """The loss, one masked block after the other, its gradient added to the network's."""
    right = []
    for group in groups:
        of_group = [g.rollout for g in group.graded if g.correct]
        if config.certainty_on == "fast" and of_group:
            speeds = [len(r.steps) / len(set(r.steps)) for r in of_group]
            least = sum(speeds) / len(speeds)
            of_group = [r for r, tpf in zip(of_group, speeds, strict=True) if tpf >= least]
        right += of_group
    tokens, total = sum(len(r.response_ids) for r in right), 0.0
    for r in right:
        ids, prompt = r.prompt_ids + r.response_ids, len(r.prompt_ids)
        if config.certainty_at == "noise":
            rng = np.random.default_rng([config.seed, 2, r.seed])
            drawn = noise(ids, prompt, BLOCK, rng, "sequence", 2, True)
            views = list(zip(drawn.block.tolist(), drawn.masked, drawn.weights, strict=True))
        else:
            views = []
            for block in range(prompt // BLOCK, len(ids) // BLOCK):
                masked = [i >= prompt for i in range(block * BLOCK, (block + 1) * BLOCK)]
                views.append((block, masked, [1.0] * BLOCK))
        for block, masked, weights in views:
            begin = block * BLOCK
            own = ids[begin : begin + BLOCK]
            seen = [mask_id if m else i for i, m in zip(own, masked, strict=True)]
            p = probabilities(network, ids[:begin], seen)
            loss = 0.0
            for j in range(BLOCK):
                if masked[j]:
                    loss = loss - config.certainty * weights[j] / tokens * p[j, own[j]].log()
            loss.backward()
            total += loss.item()
    return total


@pytest.mark.parametrize("at", ["first", "noise"])
@pytest.mark.parametrize("on", ["right", "fast"])
def test_certainty_is_a_loop_over_masked_blocks(folder, tmp_path, groups, on, at):
    for budget in (30, 100000):
        settings = {"certainty": 0.7, "certainty_on": on, "certainty_at": at, "token_budget": budget}
        settings |= {"temperature": 1.3, "top_k": 5}  # of the rollouts: it is not about them
        trainer = start(DiPOConfig, folder, tmp_path / str(budget), **settings)
        chosen = judged(groups, VERDICTS)
        network = model.load(str(folder))
        loss = certainty_by_hand(network, chosen, trainer.config, trainer.mask_id)
        rows = pack_certainty(chosen, trainer.config, BLOCK, trainer.mask_id)
        assert (len(rows) > 1) == (budget == 30)
        if at == "first":
            assert sum(row.weights.sum().item() for row in rows) == pytest.approx(0.7)
        nll = accumulate_certainty(trainer.model, rows, trainer.config)
        assert nll == pytest.approx(loss / 0.7, rel=1e-5)
        assert_same(gradients_of(trainer.model), gradients_of(network))


def test_fast_right_answers_are_fewer(folder, tmp_path, groups):
    tokens = {}
    for on in ("right", "fast"):
        config = configured(DiPOConfig, folder, tmp_path, certainty=1.0, certainty_on=on)
        rows = pack_certainty(judged(groups, VERDICTS), config, BLOCK, WORDS)
        tokens[on] = sum(len(row.scored) for row in rows)
    assert 0 < tokens["fast"] < tokens["right"]


def test_weights_of_noise_add_up_on_average(folder, tmp_path, groups):
    sums = []
    for seed in range(80):
        config = configured(DiPOConfig, folder, tmp_path, certainty=0.7, certainty_at="noise", seed=seed)
        rows = pack_certainty(judged(groups, VERDICTS), config, BLOCK, WORDS)
        sums.append(sum(row.weights.sum().item() for row in rows))
    error = np.std(sums) / math.sqrt(len(sums))
    assert abs(np.mean(sums) - 0.7) < 4 * error and np.std(sums) > 0.001


def test_without_right_answers_there_are_no_rows(folder, tmp_path, groups):
    config = configured(DiPOConfig, folder, tmp_path, certainty=1.0)
    assert pack_certainty(judged(groups, [[False] * 4] * 3), config, BLOCK, WORDS) == []


def test_a_certainty_that_is_no_number_skips_the_step(folder, tmp_path, groups):
    trainer = start(DiPOConfig, folder, tmp_path / "run", certainty=0.5)
    rows = pack_certainty(judged(groups, VERDICTS), trainer.config, BLOCK, trainer.mask_id)
    rows[0].weights[0] = math.nan
    NOTES.clear()
    accumulate_certainty(trainer.model, rows, trainer.config)
    norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0).item()
    metrics = {"loss": 0.1, "grad_norm": norm}
    assert not Guard(trainer.config).allows(1, metrics)
    assert metrics["skipped"] == f"grad_norm is nan; certainty of row 1 of {len(rows)} on rank 0 is nan"


FASTER = {
    "likelihood": "exact", "dither": 0.3, "speed_credit": 0.5, "certainty": 0.2, "normalize_each": "true",
    "rewards.speed": 0.5, "rewards.speed_if_right": 0.5, "updates": 2, "groups": 2, "group_size": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"certainty_at": "noise", "keep_groups": "correctness"},
        {"certainty_on": "fast", "credit_per": "position", "least_tpf_spread": 0.01},
    ],
    ids=str,
)
def test_a_run_for_speed_resumes_bit_for_bit(folder, tmp_path, monkeypatch, changes):
    """All terms together, killed in the middle of a step."""
    real_grade, real_log = dipo.grade, RunFolder.log

    def grade(rollouts, *arguments):  # a random checkpoint is never right: half of its answers shall be
        graded = real_grade(rollouts, *arguments)
        return [dataclasses.replace(g, correct=sum(g.rollout.response_ids) % 2 == 0) for g in graded]

    class Killed(BaseException):
        """Stands for SIGKILL."""

    def log(self, step, metrics):
        if step == 3 and "killed" in str(self.path):
            raise Killed
        real_log(self, step, metrics)

    monkeypatch.setattr(dipo, "grade", grade)
    monkeypatch.setattr(RunFolder, "log", log)
    settings = FASTER | changes | {"steps": 4, "save_every": 1}
    dipo.main(configured(DiPOConfig, folder, tmp_path / "whole", **settings))
    with pytest.raises(Killed):
        dipo.main(configured(DiPOConfig, folder, tmp_path / "killed", **settings))
    monkeypatch.setattr(RunFolder, "log", real_log)
    dipo.main(configured(DiPOConfig, folder, tmp_path / "killed", **settings, resume="true"))

    runs = {
        name: [r for _, r in read_records(tmp_path / name / "metrics.jsonl")] for name in ("whole", "killed")
    }
    for ours, theirs in zip(runs["killed"], runs["whole"], strict=True):
        timed = {name for name in theirs if "seconds" in name.split("/")}
        assert {n: v for n, v in ours.items() if n not in timed} == {
            n: v for n, v in theirs.items() if n not in timed
        }
        assert theirs["certainty_nll"] > 0 and theirs["gap_max"] < 1e-3 and "skipped" not in theirs
    for name in ("model.safetensors", "optimizer.safetensors"):
        files = [tmp_path / run / "latest" / name for run in ("whole", "killed")]
        assert files[0].read_bytes() == files[1].read_bytes()
