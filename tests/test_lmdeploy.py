"""LMDeployEngine against the embedded engine, on a CPU.

The subprocess runs LMDeploy's own scheduler, sampling, unmasking, weight loader and sleep code;
lmdeploy_on_cpu.py says what is stood in for.
"""

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import get_args

import pytest
import torch
from conftest import TINY, WORDS, chi_square
from data_rows import write_task
from test_partial import assert_same_rollouts, interrupted
from zygote import Zygote

import dipo
import evaluate
import model
from masking import HOLD, pack, replay
from plumbing import lmdeploy_child
from plumbing.checkpoint import load_tokenizer, read_copied, save, stop_ids, tiny, tiny_tokenizer
from plumbing.common import InputError
from plumbing.config import Rule, load_config
from plumbing.lmdeploy_engine import child_environment, lmdeploy_problem
from plumbing.queue import Request, SharedQueue
from rollout import Decoding, LMDeployEngine, Rollout, TorchEngine, generate_all, hold_bound, reveal

pytest.importorskip("lmdeploy", reason="pip install --no-deps -r requirements-lmdeploy.txt")
TESTS = Path(__file__).parent
STOPS = list(range(0, WORDS, 9))  # many, so that answers end everywhere in a block


@pytest.fixture(scope="module")
def zygote():
    """Forks it takes a second to start, where a process of its own would take six."""
    zygote = Zygote(["lmdeploy_zygote"])
    yield zygote
    zygote.close()


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch, zygote):
    """The stand-ins are installed in every subprocess that a test starts."""
    monkeypatch.setattr(LMDeployEngine, "launch", zygote.popen)
    monkeypatch.setattr(LMDeployEngine, "setup", "lmdeploy_on_cpu:install")
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def start(folder, log, block_size=4, stops=STOPS, dtype="float32", room=48, **changes) -> LMDeployEngine:
    mask_id = load_tokenizer(str(folder)).mask_token_id
    return LMDeployEngine(str(folder), block_size, mask_id, stops, room, dtype, log=log, **changes)


def embedded(folder, block_size=4, stops=STOPS) -> TorchEngine:
    mask_id = load_tokenizer(str(folder)).mask_token_id
    return TorchEngine(model.load(str(folder)), block_size, mask_id, stops)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("tiny") / "checkpoint", **TINY)


@pytest.fixture(scope="module", params=[1, 4, 8])
def both(request, folder, tmp_path_factory, zygote):
    """(LMDeploy, embedded) on the same checkpoint, per block size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LMDeployEngine, "launch", zygote.popen)
        patch.setattr(LMDeployEngine, "setup", "lmdeploy_on_cpu:install")
        patch.setenv("PYTHONPATH", str(TESTS))
        patch.setenv("OMP_NUM_THREADS", "1")
        log = tmp_path_factory.mktemp("log") / "engine.log"
        engine = start(folder, log, request.param)
    yield engine, embedded(folder, request.param)
    engine.close()


def prompts_of(lengths, seed=0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(WORDS) for _ in range(n)] for n in lengths]


def shown(rollout) -> tuple:
    return rollout.response_ids, rollout.steps, rollout.num_tokens, rollout.finish_reason


# ------------------------------------------------------------------------------------ same decisions


def assert_same_holds(one: Rollout, other: Rollout) -> None:
    for name, tolerance in (("hold_bounds", 1e-5), ("hold_logprobs", 1e-4)):
        for ours, theirs in zip(getattr(one, name), getattr(other, name), strict=True):
            assert ours == pytest.approx(theirs, abs=tolerance), name
    assert len(one.hold_bounds) == len(one.response_ids)


@pytest.mark.parametrize("rule", get_args(Rule))
def test_greedy_rollouts_equal_the_embedded_engines(both, rule):
    engine, reference = both
    prompts = prompts_of(range(1, 71))
    how = Decoding(top_k=1, rule=rule, threshold=0.4, denoising_steps=2, max_tokens=29, holds=True)
    rollouts = engine.generate(prompts, range(70), how)
    expected = reference.generate(prompts, range(70), how)
    for one, other in zip(rollouts, expected, strict=True):
        assert shown(one) == shown(other)
        assert_same_holds(one, other)
    first_block = engine.block_size - 1
    early = [r for r in expected if r.finish_reason == "stop" and r.num_tokens <= first_block]
    assert early or first_block == 0, "no answer ends in the block that holds the end of its prompt"
    assert any(r.finish_reason == "length" for r in expected)


def test_a_limit_inside_a_block_cuts_as_the_embedded_engine_does(both):
    engine, reference = both
    b, seen = engine.block_size, set()
    prompts = prompts_of(range(1, 31))
    for max_tokens in range(1, 2 * b + 2):
        how = Decoding(top_k=1, threshold=0.4, max_tokens=max_tokens)
        rollouts = engine.generate(prompts, range(30), how)
        expected = reference.generate(prompts, range(30), how)
        assert [shown(r) for r in rollouts] == [shown(r) for r in expected]
        for r in rollouts:
            cut = r.response_ids[r.num_tokens :]
            if r.finish_reason == "stop":
                assert r.shown_ids[-1] in STOPS and not set(r.shown_ids[:-1]) & set(STOPS)
                seen.add("stop at the limit" if r.num_tokens == max_tokens else "stop before it")
            else:
                assert r.num_tokens == max_tokens and not set(r.shown_ids) & set(STOPS)
                seen.add("stop after it" if set(cut) & set(STOPS) else "no stop")
                assert len(cut) < b
    wanted = {"stop at the limit", "stop before it", "no stop"}
    assert seen == wanted | ({"stop after it"} if b > 1 else set()), "a situation did not occur"


BANNED = list(range(1, WORDS, 2))  # every other word, so that something else is drawn everywhere


@pytest.mark.parametrize("min_tokens", [0, 1, 10, 29])
def test_a_least_length_and_banned_tokens_are_the_embedded_engines(both, min_tokens):
    engine, reference = both
    prompts = prompts_of(range(1, 41))
    how = Decoding(top_k=1, threshold=0.4, max_tokens=29, holds=True)
    how.min_tokens, how.banned_ids = min_tokens, BANNED
    rollouts = engine.generate(prompts, range(40), how)
    expected = reference.generate(prompts, range(40), how)
    for one, other in zip(rollouts, expected, strict=True):
        assert shown(one) == shown(other)
        assert_same_holds(one, other)  # p is without what is banned
    b, stopped = engine.block_size, [r for r in expected if r.finish_reason == "stop"]
    assert stopped or min_tokens == 29
    for r in expected:
        assert not set(r.response_ids) & set(BANNED)
        first = -len(r.prompt_ids) % b  # new tokens of the block that the prompt opens
        begins = [0] * first + [first + i // b * b for i in range(len(r.response_ids) - first)]
        early = [v for v, begin in zip(r.response_ids, begins, strict=True) if begin < min_tokens]
        assert not set(early) & set(STOPS), "no stop token in a block that begins before min_tokens"


SAMPLING = {
    "plain": Decoding(max_tokens=30, threshold=0.4),
    "truncated": Decoding(max_tokens=30, threshold=0.4, top_k=20, top_p=0.8, temperature=0.7),
    "static": Decoding(max_tokens=30, rule="static", denoising_steps=2),
    "sequential": Decoding(max_tokens=30, rule="sequential", denoising_steps=4),
}
DITHERED = Decoding(max_tokens=30, threshold=0.6, dither=0.4)


@pytest.mark.parametrize("how", SAMPLING.values(), ids=SAMPLING)
def test_the_trainer_gives_sampled_tokens_the_engines_logprobs(both, how):
    engine, reference = both
    rollouts = engine.generate(prompts_of(range(1, 41)), range(40), how)
    trainer, block_size = reference.model, engine.block_size
    views = [replay(r, block_size, 1.0) for r in rollouts]
    for row in pack(views, block_size, reference.mask_id, 8192):
        with torch.no_grad():
            ours = trainer.score(row, how).logprobs
        assert (ours - row.engine_logprobs).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["plain", "static", "truncated", "dithered"])
def test_the_trainer_gives_holds_the_engines_logprobs(both, name):
    engine, reference = both
    how = dataclasses.replace((SAMPLING | {"dithered": DITHERED})[name], holds=True)
    rollouts = engine.generate(prompts_of(range(1, 41)), range(40), how)
    views = [replay(r, engine.block_size, 1.0, exact=True) for r in rollouts]
    gaps = []
    for row in pack(views, engine.block_size, reference.mask_id, 8192):
        with torch.no_grad():
            ours = reference.model.score(row, how).logprobs
        held = row.targets == HOLD
        gaps.append((ours - row.engine_logprobs)[held].abs())
        assert (ours - row.engine_logprobs)[~held].abs().max() < 2e-4, (
            "whether they reached theirs belongs to it"
        )
    gaps = torch.cat(gaps)
    assert (len(gaps) > 100) == (engine.block_size > 1)
    assert (gaps > 1e-3).float().mean() < 0.01 if len(gaps) else True, "a tie that fell otherwise, at most"


EXACT = {
    "hard": Decoding(threshold=0.5, top_k=2, max_tokens=3, holds=True),
    "dithered": Decoding(threshold=0.6, dither=0.5, top_k=2, max_tokens=3, holds=True),
}


@pytest.mark.parametrize("how", EXACT.values(), ids=EXACT)
def test_trajectories_are_as_frequent_as_their_exact_likelihood_says(both, how):
    engine, reference = both
    if engine.block_size != 4:
        pytest.skip("one block size is enough")
    rollouts = engine.generate(prompts_of([9]) * 1500, range(1500), how)
    value, freedom = chi_square(rollouts, reference.model, how, 4, reference.mask_id)
    assert freedom > 10
    assert value < freedom + 4 * (2 * freedom) ** 0.5


def test_greedy_rollouts_with_dithered_thresholds_differ_by_seed(both):
    engine, reference = both
    how = dataclasses.replace(EXACT["dithered"], top_k=1, threshold=0.9, dither=0.9, max_tokens=16)
    steps = {tuple(r.steps) for r in engine.generate(prompts_of([5]) * 20, range(20), how)}
    again = {tuple(r.steps) for r in engine.generate(prompts_of([5]) * 20, range(20), how)}
    assert steps == again and (len(steps) > 1) == (engine.block_size > 1)


def test_hold_bounds_follow_from_what_was_revealed(both):
    engine, _ = both
    how = dataclasses.replace(SAMPLING["plain"], holds=True)
    below = 0
    for r in engine.generate(prompts_of(range(1, 41)), range(40), how):
        block_of = [(len(r.prompt_ids) + i) // engine.block_size for i in range(len(r.steps))]
        for i, bounds in enumerate(r.hold_bounds):
            of_block = [j for j in range(len(r.steps)) if block_of[j] == block_of[i]]
            first = min(r.steps[j] for j in of_block)
            assert len(bounds) == r.steps[i] - first, "one for each step before its own"
            for step, bound in enumerate(bounds, start=first):
                least = min(r.logprobs[j] for j in of_block if r.steps[j] == step)  # g is p here
                reached = least >= math.log(how.threshold)
                below += not reached
                assert bound == pytest.approx(math.log(how.threshold) if reached else least, abs=1e-6)
    assert below > 50 or engine.block_size == 1


@pytest.mark.parametrize("setup", ["install", "upstreams_confidence"])
def test_the_threshold_is_exact_in_bfloat16(folder, tmp_path, monkeypatch, setup):
    monkeypatch.setattr(LMDeployEngine, "setup", f"lmdeploy_on_cpu:{setup}")
    engine = start(folder, tmp_path / "log", dtype="bfloat16", stops=[])
    how = Decoding(max_tokens=60, threshold=130.99 / 256)  # bfloat16 rounds all from 130.5 on to 131
    rollouts = engine.generate(prompts_of([12] * 90), range(90), how)
    engine.close()
    wrong = 0
    for r in rollouts:
        for step in set(r.steps):
            confidences = [torch.tensor(r.logprobs[i]).exp() for i, s in enumerate(r.steps) if s == step]
            wrong += len(confidences) > 1 and min(confidences) < how.threshold - 1e-6
    assert (wrong == 0) == (setup == "install")


def test_more_requests_than_fit_at_once(folder, tmp_path):
    engine = start(folder, tmp_path / "log", options={"max_batch_size": 3, "num_gpu_blocks": 5})
    prompts, how = prompts_of([5, 70, 33, 1, 64] * 4), Decoding(top_k=1, max_tokens=60)
    ended = []
    rollouts = engine.generate(prompts, range(20), how, ended.append)
    engine.close()
    expected = embedded(folder).generate(prompts, range(20), how)
    assert [shown(r) for r in rollouts] == [shown(r) for r in expected]
    assert len(ended) == 20


def test_requests_are_taken_when_there_is_room(folder, tmp_path):
    """Never more than max_batch of them run, and all places are used; what nobody takes is not answered."""
    prompts, how = prompts_of([9, 10, 3] * 8), Decoding(top_k=1, threshold=0.6, max_tokens=14)
    numbers, taken, ended, running = iter(range(2, 20)), [], [], []

    def take() -> int | None:
        number = next(numbers, None)
        if number is not None:
            taken.append(number)
            running.append(len(taken) - len(ended))
        return number

    engine = start(folder, tmp_path / "log", room=4)
    rollouts = engine.generate(prompts, range(24), how, ended.append, take=take)
    assert engine.generate(prompts, range(24), how, ended.append, take=take) == [None] * 24
    engine.close()
    expected = embedded(folder).generate(prompts, range(24), how)
    assert [shown(r) if r else None for r in rollouts] == [
        shown(r) if 2 <= i < 20 else None for i, r in enumerate(expected)
    ]
    assert taken == list(range(2, 20)) and len(ended) == 18
    assert running[:4] == [1, 2, 3, 4] and set(running[4:]) == {4}


def test_a_queue_survives_kills_of_the_engine(folder, tmp_path):
    """Killed three times: what it had taken is done again, and nothing else."""
    prompts, how = prompts_of([20] * 30), Decoding(max_tokens=40)
    own = [Request(i, i, [], None) for i in range(30)]
    engine, ended, queue = start(folder, tmp_path / "log", room=4), [], SharedQueue(own, 4)
    updated = model.load(str(tiny(tmp_path / "updated", seed=7, **TINY)))
    engine.update_weights(updated.named_parameters())
    expected = generate_all(engine, prompts, range(30), how)

    def kill_now_and_then(rollout) -> None:
        ended.append(rollout.seed)
        if len(ended) % 10 == 5:
            engine._process.kill()

    rollouts = generate_all(
        engine, prompts, range(30), how, kill_now_and_then, updated.named_parameters, queue=queue
    )
    engine.close()
    assert [shown(r) for r in rollouts] == [shown(r) for r in expected]
    assert sorted(ended) == list(queue.taken) == list(range(30)), "one lost, or done twice"


def test_preemption_changes_no_draw(folder, tmp_path):
    prompts, how = prompts_of([5, 70, 33, 1, 64]), Decoding(max_tokens=80)
    answers = []
    for pages in (5, 100):
        options = {"max_batch_size": 3, "num_gpu_blocks": pages}
        engine = start(folder, tmp_path / "log", stops=[], options=options)
        answers.append([shown(r) for r in engine.generate(prompts, range(5), how)])
        engine.close()
    assert answers[0] == answers[1]


def test_a_request_that_the_cache_cannot_hold_is_refused(folder, tmp_path):
    engine = start(folder, tmp_path / "log", stops=[], options={"num_gpu_blocks": 4})
    message = "config key cache_gib: 0.0, .* has room for a request of 128 tokens; .* response need 132"
    with pytest.raises(InputError, match=message):
        engine.generate(prompts_of([5, 70]), [0, 1], Decoding(max_tokens=59))
    (whole,) = engine.generate(prompts_of([70]), [1], Decoding(max_tokens=58))
    engine.close()
    assert whole.num_tokens == 58


# ------------------------------------------------------------------------------------ random numbers


def copies(engine) -> int:
    """Distinct answers among 16 copies of a prompt."""
    prompt = prompts_of([10])[0]
    rollouts = engine.generate([prompt] * 16, range(16), Decoding(max_tokens=24))
    return len({tuple(r.response_ids) for r in rollouts})


def test_copies_of_a_prompt_get_answers_of_their_own(both, monkeypatch):
    monkeypatch.setattr(both[0], "stop_ids", [])
    assert copies(both[0]) == 16


def test_without_the_sampling_fix_they_do_not(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(LMDeployEngine, "setup", "lmdeploy_on_cpu:without_sampling_fix")
    engine = start(folder, tmp_path / "log", stops=[])
    assert copies(engine) < 16
    engine.close()


def test_without_the_stop_fix_answers_run_on(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(LMDeployEngine, "setup", "lmdeploy_on_cpu:without_stop_fix")
    engine = start(folder, tmp_path / "log")
    prompts, how = prompts_of(range(1, 71)), Decoding(top_k=1, threshold=0.4, max_tokens=29)
    rollouts = engine.generate(prompts, range(70), how)
    engine.close()
    expected = embedded(folder).generate(prompts, range(70), how)
    longer = [len(r.response_ids) > len(e.response_ids) for r, e in zip(rollouts, expected, strict=True)]
    assert any(longer)


def test_an_answer_depends_on_its_seed_and_not_on_its_neighbours(both):
    engine, _ = both
    prompts, how = prompts_of([7, 12, 7, 30, 9]), Decoding(max_tokens=30)
    seeds = [3, 2**62 + 5, 3, 8, 2**40]
    together = engine.generate(prompts, seeds, how)
    alone = [engine.generate([p], [s], how)[0] for p, s in zip(prompts, seeds, strict=True)]
    assert [shown(r) for r in together] == [shown(r) for r in alone]
    other = engine.generate(prompts, [s + 1 for s in seeds], how)
    assert [shown(r) for r in together] != [shown(r) for r in other]


@pytest.mark.parametrize("bit", [32, 40, 62])
def test_every_bit_of_a_seed_counts(both, bit, monkeypatch):
    engine, _ = both  # 23 bits of a run's seed stand above bit 40 of its rollouts' seeds
    monkeypatch.setattr(engine, "stop_ids", [])
    prompts, seeds, how = prompts_of([7, 12, 30, 9]), [0, 1, 2, 3], Decoding(max_tokens=24)
    here, again = (engine.generate(prompts, seeds, how) for _ in range(2))
    there = engine.generate(prompts, [seed + 2**bit for seed in seeds], how)
    assert [shown(r) for r in here] == [shown(r) for r in again]
    for one, other in zip(here, there, strict=True):
        assert one.response_ids != other.response_ids


CUTS = {
    "plain": Decoding(),
    "top_k": Decoding(top_k=9),
    "top_p": Decoding(top_k=40, top_p=0.8, temperature=0.6),
}
CUTS["temperature"] = Decoding(temperature=1.7)


@pytest.mark.parametrize("how", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("words", [7, 300])
def test_draws_follow_the_distribution(how, words):
    # Seeds that count, that differ above bit 40, that belong to positions of a block; and steps that count.
    count, same = torch.arange(20_000), torch.full((20_000,), 5)
    logits = torch.randn(words, generator=torch.Generator().manual_seed(1)) * 2
    logits[[0, -1]] = -torch.inf  # banned
    logits[4] = logits[5]
    g = model.sampling_logprobs(logits[None], how)[1][0].double().exp()
    rows = logits.expand(20_000, words)
    for seeds, offsets in (
        (count, same),
        (count << 40, same),
        (count * 0x1E3779B97F4A7C15, same),
        (same, count),
    ):
        drawn, log_p, log_g = lmdeploy_child.draw(rows, seeds, offsets, how)
        assert (log_g.double() - g[drawn].log()).abs().max() < 1e-5
        assert (log_p - (logits / how.temperature).log_softmax(-1)[drawn]).abs().max() < 1e-5
        expected, seen = g * 20_000, torch.bincount(drawn, minlength=words)
        assert not seen[g == 0].any()
        often = expected > 5
        chi_square = ((seen - expected) ** 2 / expected)[often].sum()
        freedom = int(often.sum()) - 1
        assert chi_square < freedom + 4.5 * (2 * max(freedom, 3)) ** 0.5
        few = lmdeploy_child.draw(rows[:3], seeds[:3], offsets[:3], how)[0]
        assert few.tolist() == drawn[:3].tolist(), "alone as in a batch"


@pytest.mark.parametrize("rule", get_args(Rule))
@pytest.mark.parametrize(
    "cut", [{}, {"top_k": 50, "top_p": 0.9}, {"top_k": 1}], ids=["plain", "cut", "greedy"]
)
def test_nothing_in_a_step_waits_for_the_gpu(monkeypatch, rule, cut):
    # Meta tensors have no values: to branch on one, or to read a number from it, is an error.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # the branch that CUDA takes
    how = Decoding(rule=rule, **cut)
    logits = torch.empty(96, 5000, dtype=torch.bfloat16, device="meta")
    seeds = torch.empty(96, dtype=torch.int64, device="meta")
    drawn, log_p, log_g = lmdeploy_child.draw(logits, seeds, seeds, how)
    blocks = log_p.view(-1, 4)
    revealed = reveal(blocks, torch.empty(24, 4, dtype=torch.bool, device="meta"), how)
    bounds = hold_bound(blocks, revealed, how).flatten()
    masses = lmdeploy_child.held_masses(logits, bounds, how)
    assert drawn.shape == log_p.shape == log_g.shape == bounds.shape == masses.shape == (96,)


def test_a_cut_between_equal_logits_is_the_trainers(tmp_path):
    # Every token has a twin with the same row in the LM head, and top_k is odd.
    network = model.load(str(tiny(tmp_path / "plain", **TINY)))
    with torch.no_grad():
        head = network.lm_head.weight
        head[1::2] = head[0::2]
    save(network, tmp_path / "twins", read_copied(tmp_path / "plain"))
    engine, how = start(tmp_path / "twins", tmp_path / "log", stops=[]), Decoding(max_tokens=40, top_k=5)
    rollouts = engine.generate(prompts_of(range(1, 21)), range(20), how)
    engine.close()
    trainer = embedded(tmp_path / "twins")
    for row in pack([replay(r, 4, 1.0) for r in rollouts], 4, trainer.mask_id, 8192):
        with torch.no_grad():
            ours = trainer.model.score(row, how).logprobs
        assert (ours - row.engine_logprobs).abs().max() < 1e-4


@pytest.mark.parametrize("setting", [{"temperature": 0.503}, {"top_p": 0.9}, {"top_k": 50}], ids=str)
def test_nothing_is_rounded_to_bfloat16_after_the_logits(tmp_path, setting):
    # Without what the layers add, both sides compute the same logits to the bit.
    network = model.load(str(tiny(tmp_path / "plain", **TINY)))
    with torch.no_grad():
        for layer in network.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    save(network, tmp_path / "bare", read_copied(tmp_path / "plain"))
    engine = start(tmp_path / "bare", tmp_path / "log", stops=[], dtype="bfloat16")
    how = Decoding(max_tokens=40, **setting)  # 0.503 would be 0.5039
    rollouts = engine.generate(prompts_of([8] * 40), range(40), how)
    engine.close()
    trainer = model.load(str(tmp_path / "bare"), torch.bfloat16)
    for row in pack(
        [replay(r, 4, 1.0) for r in rollouts], 4, load_tokenizer(str(tmp_path / "bare")).mask_token_id, 8192
    ):
        with torch.no_grad():
            ours = trainer.score(row, how).logprobs
        assert (ours - row.engine_logprobs).abs().max() < 1e-3


def test_every_position_draws_uniformly(folder, tmp_path):
    # A flat model: in a block that is revealed at once, equal draws at two positions are chance.
    flat = tiny(tmp_path / "flat", **TINY | {"initializer_range": 1e-4})
    engine = start(flat, tmp_path / "log", stops=[])
    how = Decoding(max_tokens=32, threshold=0.0)
    rollouts = engine.generate([[1, 2, 3, 4]] * 48, range(48), how)
    engine.close()
    blocks = [r.response_ids[i : i + 4] for r in rollouts for i in range(0, 32, 4)]
    equal = sum(len(set(block)) < 4 for block in blocks) / len(blocks)
    assert equal < 0.08, "6 pairs of 264 tokens: 2.3 % by chance"
    tokens = [v for r in rollouts for v in r.response_ids]
    assert 100 < sum(tokens) / len(tokens) < 164, "264 tokens, 131.5 on average"


# ------------------------------------------------------------------------------------ weights


def test_after_each_of_100_updates_it_answers_as_the_checkpoint_does(folder, tmp_path):
    network, prompts = model.load(str(folder)), prompts_of([3, 17, 30, 8])
    engine, how = start(folder, tmp_path / "log"), Decoding(top_k=1, max_tokens=12)
    different = set()
    for update in range(100):
        with torch.no_grad():
            for p in network.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(update)), alpha=0.05)
        save(network, tmp_path / "saved", read_copied(folder))
        if update % 10 == 5:
            engine.sleep()
        engine.update_weights(network.named_parameters())
        engine.wake()
        got = engine.generate(prompts, range(4), how)
        assert [shown(r) for r in got] == [
            shown(r) for r in embedded(tmp_path / "saved").generate(prompts, range(4), how)
        ]
        different.add(tuple(got[0].response_ids))
    assert len(different) > 50, "updates that change nothing prove nothing"
    fresh = start(tmp_path / "saved", tmp_path / "log")
    assert [shown(r) for r in fresh.generate(prompts, range(4), how)] == [shown(r) for r in got]
    for e in (engine, fresh):
        e.close()


MOE = {
    "architectures": ["SDARMoeForCausalLM"],
    "model_type": "sdar_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
}


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, MOE], ids=["tied", "experts"])
def test_updates_of_other_architectures(tmp_path, changes, monkeypatch):
    # Many buckets; the largest tensors exceed them.
    monkeypatch.setattr("plumbing.lmdeploy_engine.BUCKET_BYTES", 30_000)
    first, second = (tiny(tmp_path / str(s), seed=s, **TINY | changes) for s in (1, 2))
    engine, how = start(first, tmp_path / "log"), Decoding(top_k=1, max_tokens=16)
    prompts = prompts_of([3, 17, 30, 8])
    for folder in (first, second, first):
        engine.update_weights(model.load(str(folder)).named_parameters())
        got = engine.generate(prompts, range(4), how)
        assert [shown(r) for r in got] == [
            shown(r) for r in embedded(folder).generate(prompts, range(4), how)
        ]
    engine.close()


def test_wrong_weights_are_refused_and_right_ones_still_taken(folder, tmp_path):
    engine = start(folder, tmp_path / "log")
    tensors = dict(model.load(str(folder)).named_parameters())
    name = "model.norm.weight"
    for wrong, message in (
        ({k: v for k, v in tensors.items() if k != name}, f"missing tensor {name}"),
        (tensors | {"model.extra": torch.zeros(1)}, "unknown or repeated tensor model.extra"),
        (tensors | {name: torch.zeros(3)}, r"model.norm.weight has shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.update_weights(wrong.items())
    engine.update_weights(tensors.items())
    how = Decoding(top_k=1, max_tokens=16)
    got = engine.generate(prompts_of([9]), [0], how)
    engine.close()
    assert shown(got[0]) == shown(embedded(folder).generate(prompts_of([9]), [0], how)[0])


# ------------------------------------------------------------------------------------ life and death


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=30) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_twenty_kills_lose_no_rollout_and_leave_nothing_behind(folder, tmp_path):
    updated = model.load(str(tiny(tmp_path / "updated", seed=7, **TINY)))
    prompts, how = prompts_of([20] * 400), Decoding(max_tokens=40)
    engine = start(folder, tmp_path / "log")
    engine.update_weights(updated.named_parameters())
    expected = generate_all(engine, prompts, range(400), how)

    rng, pids, ended = random.Random(0), [], []
    finished = threading.Event()

    def kill():
        while len(pids) < 20 and not finished.is_set():
            time.sleep(rng.uniform(0.0, 0.5))  # while it starts, takes weights or generates
            process = engine._process
            if process and process.poll() is None and process.pid not in pids:
                if len(pids) % 3:  # of every three, one dies before it is ready
                    count = len(ended)
                    wait_until(lambda: len(ended) > count or finished.is_set())  # noqa: B023
                pids.append(process.pid)
                os.kill(process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    rollouts: list = []
    while killer.is_alive() or not rollouts:
        ended.clear()
        rollouts = generate_all(engine, prompts, range(400), how, ended.append, updated.named_parameters)
        assert [shown(r) for r in rollouts] == [shown(r) for r in expected]
        assert sorted(r.seed for r in ended) == list(range(400)), "one lost, or done twice"
    finished.set()
    killer.join()
    pids.append(engine._process.pid)
    maps = Path(f"/proc/{engine._process.pid}/maps").read_text().splitlines()
    named = [m for m in maps if "/dev/shm" in m and not m.endswith("(deleted)")]
    assert not named, "what has no name cannot be left behind"
    engine.close()
    assert len(set(pids)) == 21
    assert not any(map(alive, pids))


def test_the_subprocess_dies_with_its_parent(folder, tmp_path):
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[4]); sys.argv[4:] = []\n"
        "import model\nfrom rollout import *\n"
        "LMDeployEngine.setup = 'lmdeploy_on_cpu:install'\n"
        "e = LMDeployEngine(sys.argv[1], 4, int(sys.argv[2]), [], 8, 'float32', log=sys.argv[3])\n"
        "print(e._process.pid, flush=True)\n"
        "e.generate([[1, 2, 3]] * 4, range(4), Decoding(max_tokens=4000))\n"
    )
    mask_id = load_tokenizer(str(folder)).mask_token_id
    arguments = [str(folder), str(mask_id), str(tmp_path / "log"), str(TESTS.parent)]
    parent = subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert alive(child)
    time.sleep(0.5)  # in the middle of a rollout
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_until(lambda: not alive(child))


@pytest.mark.parametrize(
    "setup,message",
    [
        ("dies_when_asked", "died 3 times in a row, the last time: exit code 3"),
        ("falls_silent", "died 3 times in a row, the last time: no sign of life for 2 s"),
        ("stands_still", "died 3 times in a row, the last time: no forward pass for 2 s"),
    ],
)
def test_three_deaths_in_a_row_end_the_run(folder, tmp_path, monkeypatch, capfd, setup, message):
    monkeypatch.setattr(LMDeployEngine, "setup", f"lmdeploy_on_cpu:{setup}")
    monkeypatch.setattr(LMDeployEngine, "silence_seconds", 2)
    engine = start(folder, tmp_path / "log")
    with pytest.raises(InputError, match=message):
        engine.generate(prompts_of([5]), [0], Decoding())
    assert "last lines of" in capfd.readouterr().err


def test_a_failed_start_shows_the_childs_own_words(folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(LMDeployEngine, "setup", "lmdeploy_on_cpu:other_version")
    with pytest.raises(InputError, match=r"did not start \(exit code 1\); its log is"):
        start(folder, tmp_path / "log")
    assert "lmdeploy 0.17.9 is installed, expected 0.18.0" in capfd.readouterr().err


def test_an_error_in_the_engine_comes_with_its_traceback(folder, tmp_path):
    engine = start(folder, tmp_path / "log")
    with pytest.raises(RuntimeError, match="ValueError: Unknown unmasking strategy: .*no such rule"):
        engine.generate(prompts_of([5]), [0], Decoding(rule="no such rule"))
    got = engine.generate(prompts_of([5]), [0], Decoding(max_tokens=8))
    engine.close()
    assert len(got) == 1, "and the next call has a new engine"


def test_no_request_is_made_of_bad_prompts(both):
    with pytest.raises(InputError, match="an empty prompt"):
        both[0].generate([[1], []], [0, 1], Decoding())
    with pytest.raises(InputError, match="a prompt of 4090 tokens and max_tokens=64 exceed"):
        both[0].generate([[1] * 4090], [0], Decoding(max_tokens=64))


def test_the_subprocess_listens_on_no_port(both):
    psutil = pytest.importorskip("psutil")
    kinds = {c.family.name for c in psutil.Process(both[0]._process.pid).net_connections("all")}
    assert kinds <= {"AF_UNIX"}


# ------------------------------------------------------------------------------------ environment


def test_the_child_sees_its_ranks_gpu_and_no_launcher():
    launcher = dict.fromkeys(
        [
            "RANK",
            "LOCAL_RANK",
            "WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
            "TORCHELASTIC_RUN_ID",
            "GROUP_RANK",
        ],
        "1",
    )
    for visible, device, expected in (
        (None, 3, "3"),
        ("", 1, "1"),
        ("4,5,6,7", 2, "6"),
        ("GPU-aa, GPU-bb", 1, "GPU-bb"),
        ("4,5", None, "4,5"),
    ):
        given = launcher | {"HOME": "/h"} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
        got = child_environment(given, device)
        assert got == {"HOME": "/h", "CUDA_VISIBLE_DEVICES": expected, "LMDEPLOY_ENABLE_CHECK_ENV": "0"}


def test_another_version_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(LMDeployEngine, "setup", "")
    monkeypatch.setattr("plumbing.lmdeploy_engine.LMDEPLOY_VERSION", "0.19.0")
    assert lmdeploy_problem() == "lmdeploy 0.18.0 is installed, expected 0.19.0"
    with pytest.raises(InputError, match="config key engine: lmdeploy 0.18.0 is installed"):
        start(folder, tmp_path / "log")


# ------------------------------------------------------------------------------------ the scripts


def metrics_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_dipo_trains_and_resumes_with_it(folder, tmp_path):
    write_task(tmp_path)
    common = [
        f"model={folder}", f"data={tmp_path}/rl.jsonl", f"out={tmp_path}/run", "engine=lmdeploy", "groups=4",
        "group_size=4", "rewards={accuracy: 0.0, speed: 1.0}", "likelihood=exact", "lr=1e-3", "threshold=0.4",
        f"eval_data={tmp_path}/rl.jsonl", "eval_every=2", "eval_limit=5", "max_tokens=24", "save_every=1",
    ]  # fmt: skip
    for changes in (["steps=2"], ["steps=4", "resume=true"]):
        dipo.main(load_config(dipo.DiPOConfig, [*common, *changes]))
    lines = metrics_of(tmp_path / "run")
    assert [m["step"] for m in lines] == [1, 2, 3, 4]
    assert max(m["gap_max"] for m in lines) < 1e-4, "a stale weight would show here"
    assert lines[-1]["eval/accuracy"] >= 0
    assert (tmp_path / "run" / "engine-rank0.log").exists()


@pytest.mark.parametrize("even_ranks", ["false", "true"])
def test_two_ranks_send_the_weights_again_when_one_loses_its_engine(folder, tmp_path, even_ranks):
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, sys, threading\n"
        f"sys.path[:0] = {[str(TESTS.parent), str(TESTS)]!r}\n"
        "import dipo\nfrom rollout import LMDeployEngine\n"
        "from plumbing.common import run_script\nfrom plumbing.config import load_config\n"
        "LMDeployEngine.setup = 'lmdeploy_on_cpu:install'\n"
        "records = LMDeployEngine._receive_records\n"
        "def once(self, *more):\n"
        "    for n, item in enumerate(records(self, *more)):\n"
        "        yield item\n"
        "        if n == 3 and self._own_weights and os.environ.pop('RANK', '') == '1':\n"
        "            self._process.kill()\n"
        "LMDeployEngine._receive_records = once\n"
        "run_script(dipo.main, load_config(dipo.DiPOConfig, sys.argv[1:]))\n"
    )
    write_task(tmp_path)
    arguments = [
        f"model={folder}", f"data={tmp_path}/rl.jsonl", f"out={tmp_path}/run", "engine=lmdeploy", "groups=6",
        "group_size=4", "rewards={accuracy: 0.0, speed: 1.0}", "lr=1e-3", "threshold=0.4", "steps=3",
        f"even_ranks={even_ranks}", "max_batch=5",
    ]  # fmt: skip
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
    ]
    done = subprocess.run(run + arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("starting it again") == 1
    assert [m["gap_max"] < 1e-4 for m in metrics_of(tmp_path / "run")] == [True] * 3
    assert (tmp_path / "run" / "engine-rank1.log").exists()


def evaluate_with(*arguments: str) -> None:
    evaluate.main(load_config(evaluate.EvalConfig, list(arguments), evaluate.PROTOCOLS))


def test_an_autoregressive_baseline_is_evaluated(tmp_path, capsys):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "ar")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=264, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    network = Qwen2ForCausalLM(config)
    network.save_pretrained(tmp_path / "ar")
    write_task(tmp_path)
    arguments = [f"model={tmp_path}/ar", f"data={tmp_path}/rl.jsonl", f"out={tmp_path}/eval", "limit=12"]
    evaluate_with(*arguments, "engine=lmdeploy", "max_tokens=20")
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())["autoregressive"]
    assert summary["tpf"] == 1.0
    assert summary["questions"] == 12
    assert "autoregressive" in capsys.readouterr().out
    with pytest.raises(InputError, match="config key sweep: .* is autoregressive"):
        evaluate_with(*arguments, "engine=lmdeploy", "sweep=[0.5]")

    engine = start(tmp_path / "ar", tmp_path / "log", 0, stop_ids(tokenizer))
    prompts, how = prompts_of([3, 20, 11]), Decoding(top_k=1, max_tokens=20)
    for prompt, rollout in zip(prompts, engine.generate(prompts, range(3), how), strict=True):
        out = network.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
        assert rollout.response_ids == out[0, len(prompt) :].tolist()
        assert rollout.finish_reason == "length"
        engine.stop_ids = [rollout.response_ids[7]]
        (ended,) = engine.generate([prompt], [0], how)
        first = rollout.response_ids.index(rollout.response_ids[7])
        assert ended.shown_ids == rollout.response_ids[: first + 1], "the stop token is shown"
        assert ended.finish_reason == "stop"
        assert ended.tokens_per_forward == 1.0
    engine.stop_ids = []
    how, seeds = Decoding(max_tokens=20), [5, 5, 5 + 2**40]
    first, again, other = (r.response_ids for r in engine.generate([prompts[0]] * 3, seeds, how))
    assert first == again != other
    engine.close()
    with pytest.raises(InputError, match="model_type is qwen2, expected sdar"):
        evaluate_with(*arguments, "engine=torch", f"out={tmp_path}/other")


def test_engines_that_cannot_run_are_refused_by_name(folder, tmp_path, monkeypatch):
    write_task(tmp_path)
    common = [f"model={folder}", f"data={tmp_path}/rl.jsonl", f"out={tmp_path}/eval"]
    with pytest.raises(InputError, match="config key tensor_parallel: .*not in 'EvalConfig'"):
        evaluate_with(*common, "tensor_parallel=2")
    monkeypatch.setattr(LMDeployEngine, "setup", "")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="config key engine: lmdeploy needs CUDA"):
            evaluate_with(*common, "engine=lmdeploy")


# ---------------------------------------------------------------------------------- partial rollouts

PARTIAL = {
    "greedy": Decoding(top_k=1, threshold=0.4, holds=True),
    "sampled": dataclasses.replace(SAMPLING["plain"], holds=True),
    "truncated": SAMPLING["truncated"],
    "sequential": SAMPLING["sequential"],
    "dithered": dataclasses.replace(DITHERED, holds=True),
    "not too short": Decoding(top_k=1, threshold=0.4, min_tokens=10, banned_ids=BANNED),
}


@pytest.mark.parametrize("how", PARTIAL.values(), ids=PARTIAL)
def test_an_interrupted_rollout_is_the_uninterrupted_one(both, how):
    """Token for token and step for step, sampled too: its draws go on where they stopped."""
    engine, prompts = both[0], prompts_of(range(1, 17))
    how = dataclasses.replace(how, max_tokens=21)
    wanted = engine.generate(prompts, range(16), how)
    found, calls = interrupted(engine, prompts, range(16), how, 6)
    assert_same_rollouts(found, wanted)
    assert calls > 1
    if how.top_k == 1:
        reference, _ = interrupted(both[1], prompts, range(16), how, 6)
        assert [shown(r) for r in found] == [shown(r) for r in reference]


@pytest.mark.parametrize(
    "options", [{"max_batch_size": 3, "num_gpu_blocks": 5}, {"max_prefill_token_num": 32}], ids=str
)
def test_partial_rollouts_where_room_is_short(folder, tmp_path, options):
    """Preempted, paused and gone on with, in a cache of five pages; or prefilled in several pieces."""
    prompts, how = prompts_of([5, 70, 33, 1, 64]), Decoding(max_tokens=80)
    engine = start(folder, tmp_path / "log", stops=[], options=options)
    wanted = engine.generate(prompts, range(5), how)
    found, calls = interrupted(engine, prompts, range(5), how, 21)
    engine.close()
    assert_same_rollouts(found, wanted)
    assert calls == 4


def test_an_engine_that_dies_goes_on_from_the_unfinished_ones(folder, tmp_path):
    engine = start(folder, tmp_path / "log", stops=[])
    prompts, how = prompts_of([9, 6, 11]), Decoding(max_tokens=40, partial_tokens=17)
    begun = engine.generate(prompts, range(3), how)
    wanted = engine.generate(prompts, range(3), how, begun=begun)
    engine._process.kill()
    assert_same_rollouts(engine.generate(prompts, range(3), how, begun=begun), wanted)
    engine.close()
    assert {r.finish_reason for r in begun} == {"unfinished"}


def test_segments_with_seeds_of_their_own_have_the_distribution_of_whole_rollouts(both):
    engine, reference = both
    if engine.block_size != 4:
        pytest.skip("one block size is enough")
    how = Decoding(threshold=0.5, top_k=2, max_tokens=4, holds=True, partial_tokens=2)
    prompts = prompts_of([10]) * 1500  # two tokens in the block that the prompt opens, then four
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "stop_ids", [])
        begun = engine.generate(prompts, range(1500), how)
        rollouts = engine.generate(prompts, range(10**6, 10**6 + 1500), how, begun=begun)
    assert {len(r.response_ids) for r in begun} == {2} and {len(r.response_ids) for r in rollouts} == {6}
    value, freedom = chi_square(rollouts, reference.model, how, 4, reference.mask_id)
    assert freedom > 10
    assert value < freedom + 4 * (2 * freedom) ** 0.5
