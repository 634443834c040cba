"""The exact likelihood, by enumeration: every masked position takes one action per step, reveal or hold.

A tabular model (a table of logits for every state of one block) is small enough to enumerate every
draw at every step, hence every trajectory. The draws are enumerated and their probabilities added in
plain Python; the trajectories go through the project's own reveal, hold_bound, replay, pack and
score_logits. The likelihoods must sum to 1, be the enumerated probabilities one by one, and the
score-function gradient must be the gradient of the expected reward.
"""

import dataclasses
import itertools
import math
from dataclasses import dataclass

import pytest
import torch

from dipo import DiPOConfig, speed_credits
from masking import HOLD, pack, replay
from model import sampling_logprobs, score_logits
from reward import Graded, Question
from rollout import Decoding, Rollout, hold_bound, reveal


@dataclass
class Table:
    """Logits [(V + 1) ** B, B, V] by the state of one block, each token of it 0..V-1 or V, the mask."""

    vocabulary: int
    block_size: int
    logits: torch.Tensor  # float64
    dtype: torch.dtype = torch.double  # of the network that computes them

    @property
    def rounded(self) -> torch.Tensor:
        """The logits as that network gives them; their gradient goes to `logits` unrounded."""
        if self.dtype == torch.double:
            return self.logits
        change = self.logits.detach().to(self.dtype).double() - self.logits.detach()
        return (self.logits + change).float()

    @classmethod
    def random(cls, vocabulary: int, block_size: int, seed: int) -> "Table":
        states = (vocabulary + 1) ** block_size
        generator = torch.Generator().manual_seed(seed)
        shape = (states, block_size, vocabulary)
        logits = torch.randn(shape, generator=generator, dtype=torch.double)
        return cls(vocabulary, block_size, logits.requires_grad_())

    def number(self, state: tuple[int, ...]) -> int:
        number = 0
        for token in state:
            number = number * (self.vocabulary + 1) + token
        return number

    def distributions(self, state, how) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
        """p and g as float64 tensors with gradient, at each position, token by token."""
        p_all, g_all = [], []
        for row in self.rounded[self.number(state)].double():
            p = (row / how.temperature).exp()
            p = p / p.sum()
            ranked = sorted(range(self.vocabulary), key=lambda v: -p[v].item())
            kept = ranked[: how.top_k or self.vocabulary]
            whole = sum(p[v].item() for v in kept)
            nucleus, before = [], 0.0
            for v in kept:  # the smallest set of tokens that holds top_p of the mass
                if before <= how.top_p * whole:
                    nucleus.append(v)
                before += p[v].item()
            whole = sum(p[v] for v in nucleus)
            g_all.append([p[v] / whole if v in nucleus else 0 * p[v] for v in range(len(row))])
            p_all.append(p)
        return p_all, g_all


@dataclass
class Trajectory:
    probability: torch.Tensor  # float64, by adding up draws
    rollout: Rollout


def enumerate_trajectories(table, how, prompt) -> list[Trajectory]:
    """Every way to fill the block, by every draw at every step. The prompt's tail opens the block."""
    b, mask = table.block_size, table.vocabulary
    known = len(prompt) % b
    finished = []

    def walk(state, step, probability, record, holds):
        masked = [j for j in range(b) if state[j] == mask]
        if not masked:
            ids, steps = zip(*(record[j] for j in range(known, b)), strict=True)
            n, held = b - known, [holds.get(j, []) for j in range(known, b)]
            rollout = Rollout(
                prompt, list(ids), list(steps), [0.0] * n, n, "length",
                hold_bounds=held, hold_logprobs=[[0.0] * len(of_token) for of_token in held],
            )  # fmt: skip
            finished.append(Trajectory(probability, rollout))
            return
        p, g = table.distributions(state, how)
        log_p, _ = sampling_logprobs(table.rounded[table.number(state)], how)  # as the engine computes it
        after: dict[tuple, tuple] = {}
        for draw in itertools.product(range(table.vocabulary), repeat=len(masked)):
            chance = torch.ones((), dtype=torch.double)
            for j, v in zip(masked, draw, strict=True):
                chance = chance * g[j][v]
            if chance == 0:
                continue
            confidence = torch.zeros(b)
            for j, v in zip(masked, draw, strict=True):
                confidence[j] = log_p[j, v]
            new = dict(zip(masked, draw, strict=True))
            for likely, log_tau in thresholds(p, new, how, b):
                shown = reveal(confidence, torch.tensor([t == mask for t in state]), how, log_tau)
                bound = hold_bound(confidence, shown, how, log_tau).tolist()
                target = tuple(new[j] if shown[j] else state[j] for j in range(b))
                # Whether a reveal was forced is part of the record, where something held.
                forced = mask in target and max(bound) < math.log(how.threshold) - 1e-6  # in float32
                key = target, how.dither > 0 and forced
                total, _ = after.get(key, (0.0, 0.0))
                after[key] = (total + chance * likely, bound)
        for (target, _), (chance, bound) in after.items():
            news = {j: (target[j], step) for j in masked if target[j] != mask}
            held = {j: [*holds.get(j, []), bound[j]] for j in masked if target[j] == mask}
            walk(target, step + 1, probability * chance, record | news, holds | held)

    start = tuple(prompt[len(prompt) - known :]) + (mask,) * (b - known)
    walk(start, 1, torch.ones((), dtype=torch.double), {}, {})
    return finished


def thresholds(p, new, how, b) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """(probability, log tau [B]) of each outcome of the draws `new`: which reach their threshold."""
    if not how.dither:
        return [(torch.ones((), dtype=torch.double), None)]
    outcomes = []
    for reached in itertools.product((True, False), repeat=len(new)):
        log_tau, likely = torch.zeros(b), torch.ones((), dtype=torch.double)
        for (j, v), reaches in zip(new.items(), reached, strict=True):
            # tau is uniform on [threshold - dither, threshold]; the chance that it is at most p
            below = ((p[j][v] - how.threshold + how.dither) / how.dither).clamp(0, 1)
            likely = likely * (below if reaches else 1 - below)
            log_tau[j] = -math.inf if reaches else math.inf
        if likely > 0:
            outcomes.append((likely, log_tau))
    return outcomes


def log_likelihoods(table, how, trajectories, exact: bool) -> torch.Tensor:
    """Of every trajectory, by replaying and packing them, with logits looked up in the table."""
    b = table.block_size
    views = [replay(t.rollout, b, 1.0, exact=exact) for t in trajectories]
    total = torch.zeros(len(trajectories))
    for packed in pack(views, b, mask_id=table.vocabulary, token_budget=500):
        states = packed.ids.view(-1, b).tolist()  # each row of B neighbours is a block or a view
        numbers = [table.number(states[r // b]) for r in packed.scored.tolist()]
        assert bool((packed.view[packed.scored] > 0).all()), "only views are scored"
        logits = table.rounded[numbers, (packed.scored % b).tolist()]
        scores = score_logits(logits, packed.targets, packed.bounds, how)
        total = total.index_add(0, packed.source, scores.logprobs.to(total.dtype))
        assert exact or bool((packed.targets != HOLD).all())
    return total


DYNAMIC = [Decoding(rule="dynamic", threshold=tau) for tau in (0.4, 0.6, 0.9)]
CASES = {
    **{f"dynamic {how.threshold}": (3, 3, how, []) for how in DYNAMIC},
    "dynamic, after a whole prompt block": (3, 3, DYNAMIC[1], [0, 2, 1]),
    "dynamic, the prompt's tail in the block": (3, 3, DYNAMIC[0], [0, 2, 1, 1]),
    "dynamic, temperature": (3, 3, Decoding(temperature=0.6, threshold=0.6), []),
    "dynamic, top-k": (3, 3, Decoding(top_k=2, threshold=0.6), []),
    "dynamic, top-p": (3, 3, Decoding(top_p=0.85, threshold=0.5), []),
    "dithered": (3, 3, Decoding(threshold=0.9, dither=0.4), []),
    "dithered down to 0": (3, 3, Decoding(threshold=1.0, dither=1.0), []),
    "dithered, the prompt's tail in the block": (3, 3, Decoding(threshold=0.6, dither=0.5), [0, 2, 1, 1]),
    "dithered, temperature": (3, 3, Decoding(temperature=0.6, threshold=0.9, dither=0.6), []),
    "dithered, top-k": (3, 3, Decoding(top_k=2, threshold=0.7, dither=0.6), []),
    "dithered, top-p": (3, 3, Decoding(top_p=0.85, threshold=0.7, dither=0.6), []),
    "static, k = 1": (3, 3, Decoding(rule="static", denoising_steps=3), []),
    "static, k = 2": (2, 4, Decoding(rule="static", denoising_steps=2), []),
    "static, all at once": (3, 3, Decoding(rule="static", denoising_steps=1), []),
    "static, top-k and temperature": (
        3,
        3,
        Decoding(rule="static", denoising_steps=3, top_k=2, temperature=1.5),
        [],
    ),
    "sequential": (3, 3, Decoding(rule="sequential", denoising_steps=3), []),
    "sequential, k = 2": (2, 4, Decoding(rule="sequential", denoising_steps=2), []),
}


@pytest.mark.parametrize(("v", "b", "how", "prompt"), CASES.values(), ids=CASES.keys())
def test_exact_likelihood_is_the_probability_of_the_trajectory(v, b, how, prompt):
    table = Table.random(v, b, seed=1)
    trajectories = enumerate_trajectories(table, how, prompt)
    if how.top_k == 0 and how.top_p == 1:
        assert len(trajectories) >= v ** (b - len(prompt) % b), "every filled block can be reached"
    probability = torch.stack([t.probability for t in trajectories])
    assert probability.sum().item() == pytest.approx(1, abs=1e-12), "the oracle itself"

    exact = log_likelihoods(table, how, trajectories, exact=True)
    assert exact.exp().sum().item() == pytest.approx(1, abs=2e-6)
    torch.testing.assert_close(exact.double(), probability.log(), atol=1e-5, rtol=0)

    how_tokens = dataclasses.replace(how, dither=0.0)  # which the likelihood of the tokens does not know
    tokens = log_likelihoods(table, how_tokens, trajectories, exact=False)
    if how.rule == "sequential" or how.denoising_steps == 1:  # nothing ever holds by chance
        torch.testing.assert_close(tokens, exact)
    else:
        assert tokens.exp().sum() > 1.5, "without the holds it is no distribution"

    reward = torch.randn(len(trajectories), generator=torch.Generator().manual_seed(2)).double()
    (wanted,) = torch.autograd.grad((probability * reward).sum(), table.logits)
    surrogates = [(probability.detach() * reward * t).sum() for t in (exact, tokens)]
    by_exact, by_tokens = (torch.autograd.grad(s, table.logits)[0] for s in surrogates)
    assert error(by_exact, wanted) < 1e-5
    if how.rule == "dynamic":
        assert error(by_tokens, wanted) > 0.05, "tokens only has a biased gradient"


def tied_table(kind: str, vocabulary: int, block_size: int, dtype: torch.dtype) -> Table:
    """A table in which many confidences are equal."""
    table = Table.random(vocabulary, block_size, seed=3)
    logits = table.logits.detach()
    if kind == "equal positions":
        logits = logits[:, :1].expand_as(logits)
    elif kind == "equal tokens":  # in every position two of them, the most probable ones in some
        logits = logits.index_copy(-1, torch.tensor([1]), logits[..., :1])
    elif kind == "saturated":
        logits = torch.where(logits > logits.amax(-1, keepdim=True) - 1e-9, 60.0, -60.0)
    elif kind == "nearly saturated":  # p = 1 - 1e-9 and the like: all 1 in float32, and yet in an order
        logits = torch.where(logits > logits.amax(-1, keepdim=True) - 1e-9, 20 + logits, logits)
    elif kind == "all equal":
        logits = torch.zeros_like(logits)
    return Table(vocabulary, block_size, logits.clone().requires_grad_(), dtype)


TIED_RULES = {
    "dynamic": Decoding(threshold=0.6),
    "dynamic at a tie": Decoding(threshold=0.5),
    "dynamic, never reached": Decoding(threshold=1.0),
    "static": Decoding(rule="static", denoising_steps=3),
    "static, top-k": Decoding(rule="static", denoising_steps=3, top_k=2, temperature=0.5),
    "sequential": Decoding(rule="sequential", denoising_steps=3),
}


@pytest.mark.parametrize("dtype", [torch.double, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", TIED_RULES.values(), ids=TIED_RULES)
@pytest.mark.parametrize(
    "kind", ["equal positions", "equal tokens", "saturated", "nearly saturated", "all equal"]
)
def test_equal_confidences_are_counted_once(kind, how, dtype):
    """The order of equal ones is the same in the decoder, in the bounds and in the mass of holds."""
    table = tied_table(kind, 3, 3, dtype)
    trajectories = enumerate_trajectories(table, how, [])
    probability = torch.stack([t.probability for t in trajectories])
    assert probability.sum().item() == pytest.approx(1, abs=1e-12), "the oracle itself"
    exact = log_likelihoods(table, how, trajectories, exact=True).double()
    assert exact.exp().sum().item() == pytest.approx(1, abs=2e-6)
    likely = probability > 1e-8  # no action is scored below LOG_FLOOR
    torch.testing.assert_close(exact[likely], probability[likely].log(), atol=2e-5, rtol=0)

    reward = torch.randn(len(trajectories), generator=torch.Generator().manual_seed(2)).double()
    (wanted,) = torch.autograd.grad((probability * reward).sum(), table.logits)
    (found,) = torch.autograd.grad((probability.detach() * reward * exact).sum(), table.logits)
    assert (found - wanted).norm() < 1e-4 * max(wanted.norm().item(), 1e-3)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def score_one(logits, target, bound, how=None):
    logits = torch.tensor([logits], requires_grad=True)
    scores = score_logits(logits, torch.tensor([target]), torch.tensor([bound]), how or Decoding())
    (gradient,) = torch.autograd.grad(scores.logprobs.sum(), logits)
    return scores.logprobs.item(), gradient[0]


def test_hold_mass_by_hand():
    logits = [math.log(0.5), math.log(0.3), math.log(0.2)]
    for bound, mass in ((0.25, 0.2), (0.4, 0.5), (0.9, 1.0), (math.inf, 1.0)):
        logprob, gradient = score_one(logits, HOLD, math.log(bound))
        assert logprob == pytest.approx(math.log(mass), abs=1e-6)
        # d log h / d logit_v = p_v ([p_v < bound] / h - 1)
        by_hand = [p * ((p < bound) / mass - 1) for p in (0.5, 0.3, 0.2)]
        assert gradient.tolist() == pytest.approx(by_hand, abs=1e-6)


def test_hold_that_became_impossible_is_finite_and_without_gradient():
    logprob, gradient = score_one([0.0, 0.0, 0.0], HOLD, math.log(0.1))
    assert logprob == pytest.approx(-20.7)
    assert gradient.tolist() == [0.0, 0.0, 0.0]


def test_reveal_of_a_token_that_left_the_nucleus_is_finite():
    logprob, gradient = score_one([3.0, 2.0, -1.0], 2, 0.0, Decoding(top_k=2))
    assert logprob == pytest.approx(-20.7)
    assert bool(gradient.isfinite().all())


# ------------------------------------------------------------------ the gradient of dipo.speed_credits


@dataclass
class TwoBlocks:
    """A response of two blocks, or of one where the text ends after it, with its exact probability."""

    probability: torch.Tensor
    parts: list[tuple[Table, Rollout]]  # a block's table, and how the block was filled
    graded: Graded


def enumerate_two_blocks(how, ends_early: bool, some_wrong: bool) -> tuple[list[Table], list[TwoBlocks]]:
    """The second block has a table for each content of the first: what it says depends on that."""
    first = Table.random(2, 2, seed=5)
    second = {
        content: Table.random(2, 2, 6 + i) for i, content in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)])
    }
    found = []
    for a in enumerate_trajectories(first, how, []):
        rests = enumerate_trajectories(second[tuple(a.rollout.response_ids)], how, [])
        if ends_early and a.rollout.response_ids[1] == 0:
            rests = [None]
        for b in rests:
            ids, steps = list(a.rollout.response_ids), list(a.rollout.steps)
            probability, parts = a.probability, [(first, a.rollout)]
            if b:
                parts.append((second[tuple(a.rollout.response_ids)], b.rollout))
                ids += b.rollout.response_ids
                steps += [max(a.rollout.steps) + step for step in b.rollout.steps]
                probability = probability * b.probability
            whole = Rollout([], ids, steps, [0.0] * len(ids), len(ids), "stop")
            right = not some_wrong or sum(ids) % 3 > 0
            found.append(TwoBlocks(probability, parts, Graded(whole, Question("", ""), "", "", right, 2)))
    return [first, *second.values()], found


def counting(graded: Graded, t: int, per: str) -> int:
    """How many different steps count for token t, by going through all tokens."""
    steps, of_block = graded.rollout.steps, t // 2
    if per == "answer":
        return len({s for i, s in enumerate(steps) if i // 2 >= of_block})
    return len({s for i, s in enumerate(steps) if i // 2 == of_block and (per == "block" or s <= steps[t])})


def wanted_gradient(tables, cases, group_size: int, per: str) -> list[torch.Tensor]:
    """By table: - G sum over t of q w d E[C | right, has t], d through the logits at token t alone."""
    wanted = [torch.zeros_like(table.logits) for table in tables]
    for t in range(4):
        with_t = [c for c in cases if c.graded.correct and t < len(c.graded.rollout.steps)]
        q = sum(c.probability for c in with_t)
        mean = sum(c.probability * counting(c.graded, t, per) for c in with_t) / q
        weight = (q * (1 - (1 - q) ** (group_size - 1))).detach()
        logits = [table.logits for table in tables]
        gradients = torch.autograd.grad(mean, logits, retain_graph=True, materialize_grads=True)
        for i, gradient in enumerate(gradients):
            if (i > 0) == (t >= 2):  # the first table is that of the first block
                wanted[i][:, t % 2] -= group_size * (weight * gradient)[:, t % 2]
    return wanted


def credited_gradient(tables, cases, how, group_size: int, per: str) -> list[torch.Tensor]:
    """By table: of the expected sum over a group of credits times log-probabilities, as the code has them."""
    config = DiPOConfig(speed_credit=1.0, credit_per=per, advantage_std=False)
    kinds: dict[tuple, tuple[Graded, float]] = {}  # what credits depend on: step map and verdict
    for c in cases:
        key = (tuple(c.graded.rollout.steps), c.graded.correct)
        kinds[key] = c.graded, kinds.get(key, (None, 0.0))[1] + c.probability.item()
    expected = {}
    for key, (own, _) in kinds.items():
        expected[key] = torch.zeros(len(own.rollout.steps), dtype=torch.double)
        for others in itertools.product(kinds.values(), repeat=group_size - 1):
            chance = math.prod(likely for _, likely in others)
            credits = speed_credits([own, *(graded for graded, _ in others)], config)[0]
            expected[key] += chance * torch.tensor(credits, dtype=torch.double)

    surrogate = torch.zeros((), dtype=torch.double)
    for c in cases:
        credits = expected[tuple(c.graded.rollout.steps), c.graded.correct].tolist()
        for table, rollout in c.parts:
            views = replay(rollout, 2, 1.0, exact=True, advantage=credits[:2])
            (packed,) = pack([views], 2, mask_id=2, token_budget=99)
            states = packed.ids.view(-1, 2).tolist()
            numbers = [table.number(states[r // 2]) for r in packed.scored.tolist()]
            logits = table.logits[numbers, (packed.scored % 2).tolist()]
            scores = score_logits(logits, packed.targets, packed.bounds, how)
            likely = c.probability.detach() * group_size
            surrogate = surrogate + likely * (packed.advantages * scores.logprobs).sum()
            credits = credits[2:]
    return list(torch.autograd.grad(surrogate, [t.logits for t in tables], materialize_grads=True))


@pytest.mark.parametrize("per", ["answer", "block", "position"])
@pytest.mark.parametrize(("ends_early", "some_wrong"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("group_size", [2, 3])
def test_speed_credits_have_the_gradient_that_they_claim(per, ends_early, some_wrong, group_size):
    how = Decoding(threshold=0.9, dither=0.5)
    tables, cases = enumerate_two_blocks(how, ends_early, some_wrong)
    assert sum(c.probability for c in cases).item() == pytest.approx(1), "the oracle itself"
    found = torch.cat(credited_gradient(tables, cases, how, group_size, per))
    assert error(found, torch.cat(wanted_gradient(tables, cases, group_size, per))) < 1e-5

    # All right and of one length: per answer it is the policy gradient of the number of steps.
    if not ends_early:
        steps = sum(c.probability * c.graded.rollout.num_steps for c in cases)
        gradient = torch.autograd.grad(-group_size * steps, [table.logits for table in tables])
        off = error(found, torch.cat(gradient))
        assert off < 1e-5 if per == "answer" else off > 0.02
