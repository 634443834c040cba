"""The CUDA path: `pytest -m gpu`. Skipped without CUDA."""

import json

import numpy as np
import pytest
import torch
from data_rows import write_task

import dipo
import sft
from masking import noise, pack
from model import Sampling, load, load_tokenizer, stop_ids, tiny
from rollout import Decoding, LMDeployEngine, TorchEngine, lmdeploy_problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny(tmp_path_factory.mktemp("tiny"), head_dim=64, initializer_range=0.2))


def packed_row(folder: str, sizes: list[int]):
    rng = np.random.default_rng(0)
    mask_id = load_tokenizer(folder).mask_token_id
    views = [noise(rng.integers(0, 250, n).tolist(), 9, 4, rng, views=2) for n in sizes]
    (row,) = pack(views, 4, mask_id, 10**9)
    return row.to("cuda")


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.15)])
def test_flex_equals_dense_forward_and_backward(folder, dtype, tolerance):
    row = packed_row(folder, [200, 36, 612])
    results = []
    for attention in ("flex", "dense"):
        model = load(folder, dtype, "cuda")
        scores = model.score(row, Sampling(), attention)
        (scores.logprobs * row.weights).mean().backward()
        gradient = torch.cat([p.grad.float().flatten() for p in model.parameters()])
        results.append((scores.logprobs.detach().float(), gradient))
    (a, grad_a), (b, grad_b) = results
    assert (a - b).abs().max() < tolerance
    assert (grad_a - grad_b).norm() < tolerance * grad_b.norm()


def test_engine_and_trainer_agree_in_float32(folder):
    model, tokenizer = load(folder, torch.float32, "cuda"), load_tokenizer(folder)
    engine = TorchEngine(model, 4, tokenizer.mask_token_id, stop_ids(tokenizer))
    prompts = [list(range(1, 5 + n)) for n in range(20)]
    rollouts = engine.generate(prompts, list(range(20)), Decoding(max_tokens=40))
    rows = pack([dipo.replay(r, 4, 1.0) for r in rollouts], 4, tokenizer.mask_token_id, 4096)
    for row in rows:
        row = row.to("cuda")
        with torch.no_grad():
            gap = (model.score(row, Sampling()).logprobs - row.engine_logprobs).abs().max()
        assert gap < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_scripts_run(tmp_path, dtype):
    write_task(tmp_path)
    common = [f"dtype={dtype}", "steps=2", "token_budget=4096"]
    out = f"{tmp_path}/sft"
    sft.main([f"data={tmp_path}/sft.jsonl", f"out={out}", "batch_size=8", *common])
    dipo.main([
        f"model={out}/latest", f"data={tmp_path}/rl.jsonl", f"out={tmp_path}/dipo", "groups=2",
        "group_size=4", "rewards.speed=1.0", "likelihood=exact", "updates=2", *common,
    ])  # fmt: skip
    lines = (tmp_path / "dipo" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert all(np.isfinite(json.loads(line)["gap_max"]) for line in lines)


# ------------------------------------------------------------------------------------ LMDeploy

lmdeploy = pytest.mark.skipif(bool(lmdeploy_problem()), reason=lmdeploy_problem())
PROMPTS = [[(7 * i + j) % 250 for j in range(n)] for i, n in enumerate((3, 17, 30, 8, 64, 65))]


def start(folder, log) -> LMDeployEngine:
    tokenizer = load_tokenizer(folder)
    return LMDeployEngine(folder, 4, tokenizer.mask_token_id, stop_ids(tokenizer), 32, cache_gib=1, log=log)


def greedy(engine) -> list[list[int]]:
    rollouts = engine.generate(PROMPTS, [0] * len(PROMPTS), Decoding(top_k=1, max_tokens=40))
    return [r.response_ids for r in rollouts]


@lmdeploy
def test_weights_travel_by_ipc_and_graphs_stay_valid(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("rollout.BUCKET_BYTES", 300_000)  # several buckets, one too small for the head
    other = str(tiny(tmp_path / "other", seed=3, head_dim=64, initializer_range=0.2))
    fresh, engine = start(other, tmp_path / "fresh"), start(folder, tmp_path / "log")
    before, expected = greedy(engine), greedy(fresh)
    fresh.close()
    assert before != expected
    for source, answers in ((other, expected), (folder, before), (other, expected)):
        engine.update_weights(load(source, torch.float32, "cuda").named_parameters())
        assert greedy(engine) == answers, "in place, without capturing the graphs again"
    engine.close()


@lmdeploy
def test_sleep_gives_memory_back_and_wakes_with_new_weights(folder, tmp_path):
    engine = start(folder, tmp_path / "log")
    before = greedy(engine)
    for _ in range(3):
        assert engine.sleep() > 0.9 * 2**30, "the cache of 1 GiB"
        engine.update_weights(load(folder, torch.float32, "cuda").named_parameters())
        engine.wake()
        assert greedy(engine) == before
    engine.close()


@lmdeploy
def test_parity_gap_in_bfloat16(folder, tmp_path, capsys):
    engine, trainer = start(folder, tmp_path / "log"), load(folder, torch.bfloat16, "cuda")
    mask_id = load_tokenizer(folder).mask_token_id
    rollouts = engine.generate(PROMPTS * 5, range(30), Decoding(max_tokens=64))
    engine.close()
    gaps = []
    for row in pack([dipo.replay(r, 4, 1.0) for r in rollouts], 4, mask_id, 4096):
        row = row.to("cuda")
        with torch.no_grad():
            gaps.append((trainer.score(row, Sampling()).logprobs - row.engine_logprobs).abs())
    gap = torch.cat(gaps)
    with capsys.disabled():
        print(f"\nengine against trainer in bfloat16: mean {gap.mean():.4f}, max {gap.max():.4f}")
    assert gap.mean() < 0.03
    assert gap.max() < 0.5


@lmdeploy
def test_copies_of_a_prompt_get_answers_of_their_own(folder, tmp_path):
    engine = start(folder, tmp_path / "log")
    engine.stop_ids = []
    rollouts = engine.generate([PROMPTS[1]] * 16, range(16), Decoding(max_tokens=24))
    again = engine.generate([PROMPTS[1]] * 16, range(16), Decoding(max_tokens=24))
    engine.close()
    assert len({tuple(r.response_ids) for r in rollouts}) == 16
    assert [r.response_ids for r in rollouts] == [r.response_ids for r in again]


@lmdeploy
def test_a_least_length_and_banned_tokens(folder, tmp_path):
    engine = start(folder, tmp_path / "log")
    engine.stop_ids, banned = list(range(0, 250, 8)), set(range(1, 250, 2))
    how = Decoding(max_tokens=64, min_tokens=20, banned_ids=sorted(banned))
    rollouts = engine.generate(PROMPTS * 5, range(30), how)
    engine.close()
    assert not any(set(r.response_ids) & banned for r in rollouts)
    assert all(r.num_tokens > 20 for r in rollouts)
    assert any(r.finish_reason == "stop" for r in rollouts), "stop tokens come back after the least length"


@lmdeploy
def test_two_dipo_steps(folder, tmp_path):
    write_task(tmp_path)
    dipo.main([
        f"model={folder}", f"data={tmp_path}/rl.jsonl", f"out={tmp_path}/run", "engine=lmdeploy", "steps=2",
        "dtype=bfloat16", "groups=2", "group_size=4", "rewards={accuracy: 0.0, speed: 1.0}", "cache_gib=1",
        "threshold=0.3", "max_tokens=24",
    ])  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert all(line["gib_given_back"] > 0.9 and line["gap_mean"] < 0.05 for line in lines)
