"""The engine against a decoder that recomputes everything from scratch, and against the trainer.

The oracles are what rollout.py's first lines say, in plain Python: which positions a rule reveals, and a
decoder without a cache whose every step is one forward over prompt and blocks under a block-causal mask.
"""

import math
import random
from collections import Counter
from typing import get_args

import pytest
import torch
from conftest import TINY, chi_square

import model
from masking import pack, replay
from plumbing.checkpoint import tiny
from plumbing.common import InputError
from plumbing.config import Rule
from rollout import Decoding, Rollout, TorchEngine, end_rollout, hold_bound, reveal

RULES = get_args(Rule)
VOCABULARY, MASK = 24, 23  # a small vocabulary, so that stop tokens and repeated draws are common
STOPS = [5, 11]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Peaked distributions over few tokens: every rule has something to decide."""
    settings = TINY | {"vocab_size": VOCABULARY}
    return tiny(tmp_path_factory.mktemp("rollout") / "tiny", seed=3, **settings)


@pytest.fixture
def network(folder):
    return model.load(str(folder))


def make_engine(network, block_size=4, stops=(), max_batch=256) -> TorchEngine:
    return TorchEngine(network, block_size, MASK, list(stops), max_batch)


def random_prompts(lengths, seed=0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(MASK) for _ in range(n)] for n in lengths]


# -------------------------------------------------------------------------------- rules, one by one


def reveal_by_hand(confidence: list[float], masked: list[bool], how: Decoding) -> list[bool]:
    """The three rules of rollout.py, word for word."""
    unknown = [j for j in range(len(masked)) if masked[j]]
    best_first = sorted(unknown, key=lambda j: confidence[j], reverse=True)
    count = max(1, len(masked) // how.denoising_steps)
    if how.rule == "sequential":
        chosen = unknown[:count]
    elif how.rule == "static":
        chosen = best_first[:count]
    else:
        chosen = [j for j in unknown if confidence[j] >= how.threshold] or best_first[:1]
    return [j in chosen for j in range(len(masked))]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block_size", [1, 2, 4, 8, 16])
def test_reveal_and_hold_bound_follow_the_text(rule, block_size):
    rng = random.Random(f"{rule} {block_size}")
    for steps in sorted({1, 2, block_size, 3}):
        how = Decoding(rule=rule, threshold=rng.uniform(0.3, 0.9), denoising_steps=steps)
        cases = []
        for known_share in [0.0, 1.0] + [rng.random() for _ in range(60)]:
            masked = [rng.random() >= known_share for _ in range(block_size)]
            # powers: often none reaches the threshold, often several do
            power = rng.choice([0.2, 1.0, 6.0])
            cases.append(([rng.random() ** power for _ in range(block_size)], masked))
        confidence = torch.tensor([c for c, _ in cases]).log()
        masked = torch.tensor([m for _, m in cases])
        shown = reveal(confidence, masked, how)
        bounds = hold_bound(confidence, shown, how).exp().tolist()
        for i, (c, m) in enumerate(cases):
            by_hand = reveal_by_hand(c, m, how)
            assert shown[i].tolist() == by_hand, f"{how} {c} {m}"
            assert torch.equal(reveal(confidence[i], masked[i], how), shown[i]), "alone = in a batch"
            if not any(m):
                assert not any(by_hand)
                continue
            least = min(x for x, chosen in zip(c, by_hand, strict=True) if chosen)
            wanted = {
                "sequential": float("inf"),
                "static": least,
                "dynamic": how.threshold if least >= how.threshold else least,
            }[rule]
            assert bounds[i] == pytest.approx([wanted] * block_size, rel=1e-5)


def test_a_confidence_equal_to_the_threshold_reveals():
    how = Decoding(rule="dynamic", threshold=0.5)
    shown = reveal(torch.tensor([0.5, 0.75, 0.25]).log(), torch.tensor([True] * 3), how)
    assert shown.tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("how", "confidence", "shown", "held_if_equal"),
    [  # of equal ones the left is first; right of the last revealed an equal draw was held
        (Decoding(rule="static", denoising_steps=4), [-1.0, -1.0, -1.0, -1.0], [1, 0, 0, 0], [0, 1, 1, 1]),
        (Decoding(rule="static", denoising_steps=2), [-1.0, -0.5, -1.0, -1.0], [1, 1, 0, 0], [0, 1, 1, 1]),
        (Decoding(rule="static", denoising_steps=2), [-2.0, -1.0, -1.0, -1.0], [0, 1, 1, 0], [0, 0, 0, 1]),
        (Decoding(threshold=0.9), [-1.0, -0.7, -0.7, -3.0], [0, 1, 0, 0], [0, 0, 1, 1]),
        (Decoding(threshold=0.3), [-1.0, -0.7, -0.7, -3.0], [1, 1, 1, 0], [0, 0, 0, 0]),
        (Decoding(threshold=math.exp(-0.5)), [-0.5, -0.5, -0.7, -3.0], [1, 1, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_equally_confident_positions_have_an_order(how, confidence, shown, held_if_equal):
    confidence = torch.tensor(confidence)
    revealed = reveal(confidence, torch.tensor([True] * 4), how)
    assert revealed.tolist() == [bool(x) for x in shown]
    least = confidence[revealed].min()
    bounds = hold_bound(confidence, revealed, how)
    if how.rule == "dynamic" and least >= math.log(how.threshold):
        least = torch.tensor(math.log(how.threshold))  # here an equal draw would have been revealed
    assert (least < bounds).tolist() == [bool(x) for x in held_if_equal]
    assert (bounds - least).abs().max() < 1e-6


# -------------------------------------------------------------------------- decoding from scratch


class BlockCausal:
    """Attention by a mask written out pair by pair: a token sees its own and earlier blocks."""

    def __init__(self, length: int, block_size: int):
        self.seen = torch.tensor(
            [[j // block_size <= i // block_size for j in range(length)] for i in range(length)]
        )

    def attend(self, layer, q, k, v, scaling):
        share = q.shape[1] // k.shape[1]
        k, v = (torch.repeat_interleave(t, share, dim=1) for t in (k, v))
        weights = (q @ k.transpose(2, 3) * scaling).masked_fill(~self.seen, -torch.inf).softmax(-1)
        return (weights @ v).transpose(1, 2)


@torch.no_grad()
def logits_from_scratch(network, ids: list[int], block_size: int) -> torch.Tensor:
    hidden = network.model(
        input_ids=torch.tensor([ids]),
        position_ids=torch.arange(len(ids))[None],
        use_cache=False,
        attention=BlockCausal(len(ids), block_size),
    ).last_hidden_state
    return network.lm_head(hidden)[0]


def decode_from_scratch(network, prompt, block_size, stops, how):
    """(ids, step map) of greedy decoding, everything computed anew at every step."""
    ids, steps, step = list(prompt), [0] * len(prompt), 0
    while True:
        start = len(ids) // block_size * block_size
        first = len(ids)
        new = start + block_size - first
        ids, steps = ids + [MASK] * new, steps + [0] * new
        masked = [start + j >= first for j in range(block_size)]
        while any(masked):
            step += 1
            p = (logits_from_scratch(network, ids, block_size)[start:] / how.temperature).softmax(-1)
            confidence, drawn = p.max(-1)
            shown = reveal_by_hand(confidence.tolist(), masked, how)
            for j in range(block_size):
                if shown[j]:
                    ids[start + j], steps[start + j], masked[j] = int(drawn[j]), step, False
        response = ids[len(prompt) :]
        if any(t in stops for t in response) or len(response) >= how.max_tokens:
            return response, steps[len(prompt) :]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block_size", [1, 4, 8])
def test_cached_decoding_is_recomputation_from_scratch(network, rule, block_size):
    steps = 2 if block_size > 1 else 1
    how = Decoding(top_k=1, rule=rule, threshold=0.6, denoising_steps=steps, max_tokens=9)
    prompts = random_prompts(range(1, 21))
    rollouts = make_engine(network, block_size, STOPS, max_batch=7).generate(prompts, [0] * len(prompts), how)
    tokens_per_step = set()
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        ids, step_map = decode_from_scratch(network, prompt, block_size, STOPS, how)
        assert rollout.prompt_ids == prompt
        assert rollout.response_ids == ids, f"prompt of {len(prompt)}"
        assert rollout.steps == step_map, f"prompt of {len(prompt)}"
        tokens_per_step |= set(Counter(step_map).values())
    assert len(tokens_per_step) > 1 or block_size == 1 or rule != "dynamic", "always the same speed"


# ---------------------------------------------------------------------------- batches and seeds


def is_same(one: Rollout, other: Rollout) -> bool:
    """The same answer up to the rounding of its log-probabilities and bounds."""
    exact = ("prompt_ids", "response_ids", "steps", "num_tokens", "finish_reason", "seed")
    if not all(getattr(one, n) == getattr(other, n) for n in exact):
        return False
    flat = [[r.logprobs, *r.hold_bounds, *r.hold_logprobs] for r in (one, other)]
    return all(a == pytest.approx(b, abs=1e-4) for a, b in zip(*flat, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_same_answer_alone_in_a_batch_and_among_comers_and_goers(network, rule):
    how = Decoding(rule=rule, threshold=0.6, denoising_steps=2, max_tokens=16, holds=True)
    prompts = random_prompts([1, 6, 4, 13, 3, 20, 8, 2, 9, 5])
    seeds = list(range(10))
    together = make_engine(network, 4, STOPS).generate(prompts, seeds, how)
    assert len({len(r.response_ids) for r in together}) > 1, "they should leave at different times"
    ended = []
    few = make_engine(network, 4, STOPS, max_batch=3).generate(prompts, seeds, how, ended.append)
    again = make_engine(network, 4, STOPS, max_batch=3).generate(prompts, seeds, how)
    assert few == again, "the same call gives the same bits"
    assert sorted(r.seed for r in ended) == seeds and ended != few, "done sees each as it ends"
    alone_engine = make_engine(network, 4, STOPS)
    for i in range(10):
        (alone,) = alone_engine.generate([prompts[i]], [seeds[i]], how)
        assert alone.seed == seeds[i] and alone.prompt_ids == prompts[i]
        assert is_same(alone, together[i]) and is_same(alone, few[i])


def test_seeds_differ_and_repeat(network):
    how = Decoding(temperature=3.0, max_tokens=16)
    engine = make_engine(network)
    copies = engine.generate([[1, 2, 3]] * 16, range(16), how)
    assert len({tuple(r.response_ids) for r in copies}) == 16
    repeated = engine.generate([[1, 2, 3]] * 4, [9] * 4, how)
    assert all(is_same(r, copies[9]) for r in repeated)


def test_nothing_to_do(network):
    assert make_engine(network).generate([], [], Decoding()) == []


# -------------------------------------------------------------------------------- where it ends


@pytest.mark.parametrize(
    ("ids", "max_tokens", "num_tokens", "reason"),
    [
        ([1, 2, 3, 4], 8, 4, "length"),
        ([1, 2, 3, 4], 4, 4, "length"),
        ([1, 2, 3, 4], 3, 3, "length"),  # inside a block
        ([1, 5, 3, 4], 4, 2, "stop"),
        ([1, 2, 3, 5], 4, 4, "stop"),
        ([1, 2, 5, 4], 3, 3, "stop"),
        ([1, 2, 3, 5], 3, 3, "length"),  # the stop token is beyond the limit
        ([1, 11, 5, 5], 4, 2, "stop"),  # the first of several
    ],
)
def test_what_of_a_response_is_shown(ids, max_tokens, num_tokens, reason):
    steps, logprobs = [1, 1, 2, 3], [-0.1, -0.2, -0.3, -0.4]
    record = {"response_ids": ids, "steps": steps, "logprobs": logprobs}
    rollout = end_rollout([7, 5], 3, record, Decoding(max_tokens=max_tokens), STOPS)
    assert rollout == Rollout([7, 5], ids, steps, logprobs, num_tokens, reason, seed=3)
    assert rollout.shown_ids == ids[:num_tokens]


def test_ends_and_what_the_user_sees(network):
    how = Decoding(temperature=2.0, rule="dynamic", threshold=0.5, max_tokens=10, holds=True)
    block_size, stops = 4, {3, 5, 11}
    lengths = [1 + i % 9 for i in range(200)]
    prompts = [p[:-1] + [5] for p in random_prompts(lengths)]  # a stop token of the prompt's ends nothing
    rollouts = make_engine(network, block_size, stops).generate(prompts, range(200), how)
    seen = Counter()
    for prompt, r in zip(prompts, rollouts, strict=True):
        length, first_stop = 0, None
        while length < how.max_tokens and first_stop is None:  # a block more
            length += block_size - (len(prompt) + length) % block_size
            block = r.response_ids[:length]
            first_stop = next((i for i, t in enumerate(block) if t in stops), None)
        assert len(r.response_ids) == length, "whole blocks, and no block more"
        assert (len(prompt) + length) % block_size == 0
        for values in (r.steps, r.logprobs, r.hold_bounds, r.hold_logprobs):
            assert len(values) == length
        assert sorted(set(r.steps)) == list(range(1, r.num_steps + 1)), "every token has its step"
        assert r.tokens_per_forward == pytest.approx(length / len(set(r.steps)))
        if first_stop is not None and first_stop < how.max_tokens:
            assert (r.finish_reason, r.num_tokens) == ("stop", first_stop + 1)
            seen["stop inside a block"] += first_stop + 1 < length
            tail = len(prompt) % block_size
            seen["stop in the prompt's block"] += tail > 0 and length == block_size - tail
            seen["block kept after the stop"] += length - first_stop > 2
        else:
            assert (r.finish_reason, r.num_tokens) == ("length", how.max_tokens)
            seen["length inside a block"] += length > how.max_tokens
            seen["length at a block's end"] += length == how.max_tokens
            seen["stop beyond the length"] += first_stop is not None
        assert r.shown_ids == r.response_ids[: r.num_tokens]
    assert min(seen.values()) > 0 and len(seen) == 6, f"a situation did not occur: {seen}"


@pytest.mark.parametrize("max_tokens", [1, 3])
def test_fewer_tokens_than_a_block(network, max_tokens):
    how = Decoding(max_tokens=max_tokens)
    engine = make_engine(network, 8)
    for prompt in random_prompts([1, 6, 8, 15]):
        (r,) = engine.generate([prompt], [0], how)
        first_block = 8 - len(prompt) % 8
        wanted = first_block if first_block >= max_tokens else first_block + 8
        assert len(r.response_ids) == wanted
        assert (r.num_tokens, r.finish_reason) == (max_tokens, "length")


@pytest.mark.parametrize(("longest", "fits"), [(64, True), (65, False)])
def test_a_prompt_has_to_fit(tmp_path, longest, fits):
    settings = TINY | {"vocab_size": VOCABULARY, "max_position_embeddings": 80}
    engine = make_engine(model.load(str(tiny(tmp_path / "short", **settings))))
    prompts, how = random_prompts([3, longest]), Decoding(max_tokens=16)
    if fits:
        assert len(engine.generate(prompts, [0, 0], how)[1].response_ids) == 16
        return
    with pytest.raises(InputError, match=r"65 tokens and max_tokens=16 exceed.* 80 positions"):
        engine.generate(prompts, [0, 0], how)


def test_an_empty_prompt_is_refused(network):
    with pytest.raises(InputError, match="empty prompt"):
        make_engine(network).generate([[1], []], [0, 0], Decoding())


# ---------------------------------------------------------------------------- engine and trainer

SAMPLINGS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 4},
    "top-p": {"top_p": 0.7},
    "all": {"temperature": 1.7, "top_k": 9, "top_p": 0.8},
}


def gap(network, rollouts, how, block_size) -> float:
    """Largest |trainer - engine| log-probability over all reveals."""
    views = [replay(r, block_size, 1.0) for r in rollouts]
    largest, scored = 0.0, 0
    for packed in pack(views, block_size, MASK, token_budget=400):
        with torch.no_grad():
            logprobs = network.score(packed, how).logprobs
        largest = max(largest, (logprobs - packed.engine_logprobs).abs().max().item())
        scored += len(logprobs)
    assert scored == sum(len(r.response_ids) for r in rollouts), "every token once"
    return largest


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
@pytest.mark.parametrize("block_size", [1, 4, 8])
def test_engine_and_trainer_agree_on_every_logprob(network, rule, sampling, block_size):
    steps = min(2, block_size)
    how = Decoding(**sampling, rule=rule, threshold=0.6, denoising_steps=steps, max_tokens=14)
    prompts = random_prompts([1, 5, 8, 11, 18, 3])
    rollouts = make_engine(network, block_size, STOPS).generate(prompts, range(6), how)
    assert any(min(r.logprobs) < -0.1 for r in rollouts), "not all certain"
    assert gap(network, rollouts, how, block_size) < 1e-4


def test_the_gap_notices_what_is_wrong(network, folder):
    how = Decoding(rule="dynamic", threshold=0.6, max_tokens=14)
    prompts = random_prompts([1, 5, 8, 11, 18, 3])
    rollouts = make_engine(network).generate(prompts, range(6), how)
    assert gap(network, rollouts, how, 4) < 1e-4

    for changed in ({"temperature": 1.01}, {"top_k": 8}, {"top_p": 0.95}):
        assert gap(network, rollouts, Decoding(**changed), 4) > 1e-4, changed
    for r in rollouts:
        r.steps = [s + 1 if s == r.steps[-1] - 1 else s for s in r.steps]  # two steps made one
    assert gap(network, rollouts, how, 4) > 1e-4, "another step map"

    stale = model.load(str(folder))
    with torch.no_grad():
        stale.model.layers[1].mlp.down_proj.weight[7, 7] += 0.1
    rollouts = make_engine(stale).generate(prompts, range(6), how)
    assert gap(network, rollouts, how, 4) > 1e-4, "one stale weight"


def test_draws_have_the_distribution_that_is_trained(network):
    prompt, count = [4, 9, 1], 6000
    logits = logits_from_scratch(network, prompt + [MASK], 1)[-1].double()
    engine = make_engine(network, 1, max_batch=count)
    for sampling in SAMPLINGS.values():
        how = Decoding(**sampling, max_tokens=1)
        p = (logits / how.temperature).softmax(-1)
        kept, mass = [], 0.0
        ranked = p.argsort(descending=True).tolist()[: how.top_k or VOCABULARY]
        whole = sum(p[v].item() for v in ranked)
        for v in ranked:
            if mass <= how.top_p * whole:
                kept.append(v)
            mass += p[v].item()
        total = sum(p[v].item() for v in kept)
        wanted = {v: p[v].item() / total for v in kept}
        assert len(wanted) > 1, "nothing to draw"
        rollouts = engine.generate([prompt] * count, range(count), how)
        drawn = Counter(r.response_ids[0] for r in rollouts)
        assert set(drawn) <= set(wanted), "drawn although cut off"
        chi_square = sum((drawn[v] - count * q) ** 2 / (count * q) for v, q in wanted.items())
        freedom = len(wanted) - 1
        assert chi_square < freedom + 4 * (2 * freedom) ** 0.5, f"{how} {drawn}"
        for r in rollouts[:50]:
            assert r.logprobs[0] == pytest.approx(
                torch.tensor(wanted[r.response_ids[0]]).log().item(), abs=1e-4
            )


# --------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("tied", [False, True])
def test_new_weights_in_place_are_a_fresh_engine(tmp_path, tied):
    settings = TINY | {"vocab_size": VOCABULARY, "tie_word_embeddings": tied}
    networks = [model.load(str(tiny(tmp_path / str(seed), seed=seed, **settings))) for seed in (0, 1)]
    how, prompts = Decoding(max_tokens=12, threshold=0.6), random_prompts([1, 6, 9])
    engine, fresh = make_engine(networks[0]), make_engine(networks[1])
    before, wanted = (e.generate(prompts, range(3), how) for e in (engine, fresh))
    assert before != wanted
    storage = {n: p.data_ptr() for n, p in networks[0].named_parameters()}
    engine.update_weights((n, p.detach().clone()) for n, p in networks[1].named_parameters())
    assert engine.generate(prompts, range(3), how) == wanted
    assert storage == {n: p.data_ptr() for n, p in networks[0].named_parameters()}, "in place"
    engine.sleep()
    engine.wake()
    assert engine.generate(prompts, range(3), how) == wanted


def test_a_tied_head_that_comes_as_well_is_left_out(tmp_path):
    settings = TINY | {"vocab_size": VOCABULARY, "tie_word_embeddings": True}
    networks = [model.load(str(tiny(tmp_path / str(seed), seed=seed, **settings))) for seed in (0, 1)]
    how, prompts = Decoding(max_tokens=12, threshold=0.6), random_prompts([1, 6, 9])
    engine, fresh = make_engine(networks[0]), make_engine(networks[1])
    tensors = {n: p.detach().clone() for n, p in networks[1].named_parameters()}
    assert "lm_head.weight" not in tensors
    engine.update_weights((tensors | {"lm_head.weight": torch.zeros(VOCABULARY, 64)}).items())
    assert engine.generate(prompts, range(3), how) == fresh.generate(prompts, range(3), how)


def test_wrong_weights_are_refused(network):
    engine = make_engine(network)
    tensors = {n: p.detach().clone() for n, p in network.named_parameters()}
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=name):
        engine.update_weights((n, t) for n, t in tensors.items() if n != name)
    with pytest.raises(ValueError, match="nonsense"):
        engine.update_weights((tensors | {"nonsense": torch.zeros(1)}).items())
    with pytest.raises(ValueError, match=name):
        engine.update_weights([*tensors.items(), (name, tensors[name])])


@pytest.mark.parametrize("shape", [(1,), (96, 64, 1)])
def test_weights_of_another_shape_are_refused(network, shape):
    tensors = {n: p.detach().clone() for n, p in network.named_parameters()}
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=name):
        make_engine(network).update_weights((tensors | {name: torch.zeros(shape)}).items())
    torch.testing.assert_close(network.get_parameter(name), tensors[name])


EXACT = {
    "hard": Decoding(threshold=0.5, top_k=3, max_tokens=3, holds=True),
    "dithered": Decoding(threshold=0.6, dither=0.5, top_k=3, max_tokens=3, holds=True),
    "dithered, cut": Decoding(threshold=0.7, dither=0.6, top_p=0.8, max_tokens=3, holds=True),
    "static": Decoding(rule="static", denoising_steps=2, top_k=3, max_tokens=3, holds=True),
}


@pytest.mark.parametrize("how", EXACT.values(), ids=EXACT)
def test_trajectories_are_as_frequent_as_their_exact_likelihood_says(network, how):
    """The likelihood itself is held against enumeration in test_likelihood.py."""
    engine = make_engine(network, max_batch=1000)
    rollouts = engine.generate([random_prompts([9])[0]] * 3000, list(range(3000)), how)
    value, freedom = chi_square(rollouts, network, how, 4, MASK)
    assert freedom > 30
    assert value < freedom + 4 * (2 * freedom) ** 0.5
