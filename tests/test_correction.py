"""config.correction, by enumeration: an engine whose table of logits is not quite the trainer's.

Every trajectory of a tabular model is enumerated with the engine's table, its actions are scored with both,
and the surrogate of dipo.py is added up with the engine's probabilities: the expected gradient, without
sampling. The oracle enumerates other engines: one for each state and position, which draws there as the
trainer does, and elsewhere as the engine.
"""

import math

import pytest
import torch
from conftest import TINY, Trainer
from data_rows import write_task
from test_dipo import BLOCK, QUESTIONS, SPEED, configured
from test_likelihood import Table, enumerate_trajectories, error

from dipo import (
    DiPOConfig,
    accumulate_gradients,
    correction_sums,
    correction_weights,
    dipo_loss,
    pack_groups,
    sample_groups,
    score_rows,
    training_metrics,
)
from masking import HOLD, pack, replay
from model import score_logits
from plumbing.checkpoint import tiny
from rollout import Decoding

V, B = 2, 3  # small: the oracle enumerates 27 engines
FAR = 1e18  # a bound that no ratio reaches
RULES = {
    "dynamic": Decoding(threshold=0.7),
    "dynamic, mostly below": Decoding(threshold=0.95),
    "dithered": Decoding(threshold=1.0, dither=1.0),
    "static": Decoding(rule="static", denoising_steps=3),
    "sequential": Decoding(rule="sequential", denoising_steps=3),
}


def perturbed(table: Table, size: float, seed: int = 9) -> Table:
    """The same network, rounded otherwise: normal noise of this size on every logit, without gradient."""
    noise = torch.randn(table.logits.shape, generator=torch.Generator().manual_seed(seed)).double()
    return Table(table.vocabulary, table.block_size, table.logits.detach() + size * noise)


def reward_of(rollout) -> float:
    """Some number for each response and order of reveals."""
    seed = 0
    for token, step in zip(rollout.response_ids, rollout.steps, strict=True):
        seed = seed * 31 + 7 * token + step
    return torch.randn((), generator=torch.Generator().manual_seed(seed)).item()


def expected_gradient(
    pi: Table, mu: Table, how: Decoding, config: DiPOConfig, constant: bool = False, product: bool = False
):
    """Of the surrogate of dipo.py, over all trajectories of the engine: [states, B, V].

    Args:
        product: weigh by the product of all ratios of a trajectory instead of config.correction.
    """
    trajectories = enumerate_trajectories(mu, how, [])
    views = []
    for t in trajectories:
        advantage = 1.0 if constant else reward_of(t.rollout)
        views.append(replay(t.rollout, B, t.probability.item(), exact=True, advantage=advantage))
    (packed,) = pack(views, B, mask_id=V, token_budget=10**6)
    states = packed.ids.view(-1, B).tolist()
    at = [pi.number(states[r // B]) for r in packed.scored.tolist()], (packed.scored % B).tolist()
    ours = score_logits(pi.logits[at], packed.targets, packed.bounds, how).logprobs
    theirs = score_logits(mu.logits[at], packed.targets, packed.bounds, how).logprobs
    old = ours.detach()
    if product:
        whole = torch.zeros(len(views), dtype=torch.double).index_add(0, packed.source, old - theirs).exp()
        correction = whole[packed.source]
    else:
        correction = correction_weights(old, theirs, packed.targets == HOLD, config)
    loss, _ = dipo_loss(ours, old, packed.advantages, packed.weights * correction, config)
    return torch.autograd.grad(-loss, pi.logits)[0]


def expected_reward(table: Table, how: Decoding) -> torch.Tensor:
    return sum(t.probability * reward_of(t.rollout) for t in enumerate_trajectories(table, how, []))


def one_action_at_a_time(pi: Table, mu: Table, how: Decoding) -> torch.Tensor:
    """The gradient of the sum of J(s, j): the engine, with one row of logits that is the trainer's."""
    gradient = torch.zeros_like(pi.logits)
    for state in range(len(pi.logits)):
        for position in range(B):
            is_masked = state // (V + 1) ** (B - 1 - position) % (V + 1) == V
            if is_masked:
                logits = mu.logits.clone()
                logits[state, position] = pi.logits[state, position]
                value = expected_reward(Table(V, B, logits), how)
                gradient += torch.autograd.grad(value, pi.logits)[0]
    return gradient


@pytest.mark.parametrize("how", RULES.values(), ids=RULES)
def test_each_setting_optimises_what_it_claims(how):
    """Where no token lies between the two on the other side of a bound: the noise is small."""
    pi = Table.random(V, B, seed=1)
    mu = perturbed(pi, 0.05)
    none, truncate = DiPOConfig(), DiPOConfig(correction="truncate", correction_high=FAR)
    found = {
        "none": expected_gradient(pi, mu, how, none),
        "truncate": expected_gradient(pi, mu, how, truncate),
        "product": expected_gradient(pi, mu, how, none, product=True),
    }
    of_actions = one_action_at_a_time(pi, mu, how)
    (of_policy,) = torch.autograd.grad(expected_reward(pi, how), pi.logits)
    off = {name: (error(g, of_actions), error(g, of_policy)) for name, g in found.items()}
    print({name: tuple(f"{x:.1e}" for x in errors) for name, errors in off.items()})
    assert off["truncate"][0] < 1e-5, "the sum of J(s, j), exactly"
    assert off["product"][1] < 1e-5, "the policy gradient takes the product of ratios, exactly"
    assert off["none"][0] > 0.01 and off["none"][1] > 0.01
    assert off["truncate"][1] > 1e-3, "states and continuations remain the engine's"


def test_a_constant_advantage_has_no_gradient_only_if_corrected():
    pi = Table.random(V, B, seed=1)
    mu, how = perturbed(pi, 0.05), RULES["dynamic"]
    scale = one_action_at_a_time(pi, mu, how).norm()
    truncate = DiPOConfig(correction="truncate", correction_high=FAR)
    assert expected_gradient(pi, mu, how, truncate, constant=True).norm() < 1e-5 * scale
    assert expected_gradient(pi, mu, how, DiPOConfig(), constant=True).norm() > 0.01 * scale


def test_what_bounds_cost():
    """Bias falls as the bounds widen; of `mask` it is the gradient without the actions that it leaves out."""
    pi = Table.random(V, B, seed=1)
    mu, how = perturbed(pi, 0.3), RULES["sequential"]
    wanted, off = one_action_at_a_time(pi, mu, how), {}
    for correction in ("truncate", "mask"):
        for high in (1.0, 1.2, 1.5, FAR):
            config = DiPOConfig(correction=correction, correction_low=1 / high, correction_high=high)
            off[correction, high] = error(expected_gradient(pi, mu, how, config), wanted)
        widening = [off[correction, high] for high in (1.0, 1.2, 1.5, FAR)]
        assert widening == sorted(widening, reverse=True) and widening[0] > 0.02
        assert widening[-1] < 1e-5
    print({key: f"{x:.3f}" for key, x in off.items()})


def test_a_token_that_rounding_moved_over_a_bound_is_not_corrected():
    """The limit of the claim: as sets of tokens differ, ratios of holds and reveals are no probabilities'."""
    how, pi = Decoding(threshold=0.6), Table.random(V, B, seed=1)
    logits = pi.logits.detach().clone()
    start = pi.number((V, V, V))
    logits[start, 0] = torch.tensor([math.log(0.601), math.log(0.399)])
    pi = Table(V, B, logits.requires_grad_())
    moved = logits.detach().clone()
    moved[start, 0] = torch.tensor([math.log(0.599), math.log(0.401)])
    truncate = DiPOConfig(correction="truncate", correction_high=FAR)
    found = expected_gradient(pi, Table(V, B, moved), how, truncate)
    (wanted,) = torch.autograd.grad(expected_reward(pi, how), pi.logits)  # of nearly the same policy
    assert error(found, wanted) > 0.05


# ------------------------------------------------------------------------------------------ by hand

TRAINER = [-1.0, -1.0, -16.0, -0.5, -3.0, -1.0]
ENGINE = [-1.0, -3.0, -0.1, -0.5, -1.0, -0.5]
HELD = [True, True, True, False, False, False]
RATIOS = [1.0, math.exp(2), math.exp(-15.9), 1.0, math.exp(-2), math.exp(-0.5)]


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, [1, 1, math.exp(-15.9), 1, 1, 1]),
        ({"correction": "truncate"}, [1, 2, math.exp(-15.9), 1, math.exp(-2), math.exp(-0.5)]),
        ({"correction": "truncate", "correction_high": 8.0}, RATIOS),
        ({"correction": "mask"}, [1, 0, 0, 1, 0, math.exp(-0.5)]),
        (
            {"correction": "mask", "correction_low": 0.1, "correction_high": 8.0},
            [1, RATIOS[1], 0, *RATIOS[3:]],
        ),
    ],
)
def test_weights_and_their_figures_by_hand(fields, wanted):
    config = DiPOConfig(**fields)
    trainer, engine, held = torch.tensor(TRAINER), torch.tensor(ENGINE), torch.tensor(HELD)
    weights = correction_weights(trainer, engine, held, config)
    assert weights.tolist() == pytest.approx(wanted)
    sums = correction_sums(trainer, engine, weights)
    assert sums["ratio"].item() == pytest.approx(sum(RATIOS))
    assert sums["ratio_squared"].item() == pytest.approx(sum(r * r for r in RATIOS))
    if fields:
        out = sum(w != pytest.approx(r, abs=1e-12) for w, r in zip(wanted, RATIOS, strict=True))
        assert sums["corrected"] == out


# --------------------------------------------------------------------------------------- in a step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("correction")
    write_task(place)
    return tiny(place / "tiny", **TINY)


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("correction", ["none", "truncate", "mask"])
def test_a_step_weighs_every_action(folder, tmp_path, correction, updates):
    """Against a loss written down action by action, with an engine that disagrees; metrics of all rows."""
    settings = SPEED | {"correction": correction, "updates": updates, "group_size": 4, "likelihood": "exact"}
    settings |= {"correction_low": 0.8, "correction_high": 1.2, "token_budget": 200}
    trainer = Trainer(configured(DiPOConfig, folder, tmp_path / "run", **settings))
    config = trainer.config
    asked = [(i, i) for i in range(6)]
    sampled = sample_groups(trainer.engine(), trainer.model, trainer.tokenizer, QUESTIONS, asked, config)
    packs = pack_groups([g for g in sampled if g.useful], config, BLOCK, trainer.mask_id)
    assert len(packs) > 1
    for i, packed in enumerate(packs):
        noise = torch.randn(len(packed.engine_logprobs), generator=torch.Generator().manual_seed(i))
        packed.engine_logprobs += 0.2 * noise
    rows = score_rows(packs, trainer.model, None, config)
    stats = []
    for update in range(updates):
        stats += accumulate_gradients(trainer.model, rows, config, first_update=update == 0)
    found = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    metrics = training_metrics(stats, config)

    trainer.optimizer.zero_grad()
    ratios, out = [], 0
    for packed in packs:
        logprobs = trainer.model.score(packed, Decoding.from_config(config)).logprobs
        actions = zip(logprobs, packed.engine_logprobs.tolist(), packed.targets.tolist(), strict=True)
        loss = 0.0
        for k, (logprob, engine, target) in enumerate(actions):
            ratio = math.exp(logprob.item() - engine)
            weight = {
                "none": min(ratio, 1.0) if target == HOLD else 1.0,
                "truncate": min(ratio, 1.2),
                "mask": ratio if 0.8 <= ratio <= 1.2 else 0.0,
            }[correction]
            ratios.append(ratio)
            out += weight != ratio
            loss = loss - weight * packed.weights[k] * packed.advantages[k] * logprob
        (loss * updates).backward()
    for name, parameter in trainer.model.named_parameters():
        assert error(found[name], parameter.grad) < 1e-5, name
    names = {"correction_ratio", "correction_ess", "correction_share"}
    if correction == "none":
        assert not names & metrics.keys()
        return
    n = len(ratios)
    assert metrics["correction_ratio"] == pytest.approx(sum(ratios) / n, rel=1e-5)
    square = sum(r * r for r in ratios)
    assert metrics["correction_ess"] == pytest.approx(sum(ratios) ** 2 / n / square, rel=1e-5)
    assert metrics["correction_share"] == pytest.approx(out / n)
    assert 0.1 < metrics["correction_share"] < 0.9
