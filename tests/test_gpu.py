"""The CUDA path: `pytest -m gpu -n 4`. Skipped without CUDA.

`make gpu` runs these as its last stage. Its other stages check what is not here: LMDeploy's parity, weight
updates and sleep, the whole loop.
"""

import json

import gpu
import numpy as np
import pytest
import scoring
import torch
from data_rows import write_task
from safetensors.torch import load_file

import dipo
import sft
from masking import block_mask, noise, pack, replay
from model import Sampling, load
from plumbing import kernels
from plumbing.checkpoint import load_tokenizer, stop_ids, tiny
from plumbing.config import load_config
from plumbing.kernels import checkpoint_layers, compile_layers
from plumbing.lmdeploy_engine import lmdeploy_problem
from rollout import Decoding, TorchEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny(tmp_path_factory.mktemp("tiny"), head_dim=64, initializer_range=0.2))


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Else the variants of one function add up to torch's limit, and later tests run it eagerly."""
    torch._dynamo.reset()


def run_sft(*arguments: str) -> None:
    sft.main(load_config(sft.SFTConfig, list(arguments)))


def run_dipo(*arguments: str) -> None:
    dipo.main(load_config(dipo.DiPOConfig, list(arguments)))


def packed_row(folder: str, sizes: list[int]):
    rng = np.random.default_rng(0)
    mask_id = load_tokenizer(folder).mask_token_id
    views = [noise(rng.integers(0, 250, n).tolist(), 9, 4, rng, views=2) for n in sizes]
    (row,) = pack(views, 4, mask_id, 10**9)
    return row.to("cuda")


# Differences of log-probabilities, mean and largest, and the relative one of the gradient. In bfloat16 two
# right ways to compute this row are 0.03, 0.16 and 0.01 apart (CPU, joint and dense).
CLOSE = {torch.float32: (1e-4, 1e-3, 1e-3), torch.bfloat16: (0.06, 0.5, 0.05)}


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_flex_equals_dense_forward_and_backward(folder, dtype):
    row = packed_row(folder, [200, 36, 612])
    results = []
    for attention in ("flex", "dense"):
        model = load(folder, dtype, "cuda")
        scores = model.score(row, Sampling(), attention)
        (scores.logprobs * row.weights).mean().backward()
        gradient = torch.cat([p.grad.float().flatten() for p in model.parameters()])
        results.append((scores.logprobs.detach().float(), gradient))
    (a, grad_a), (b, grad_b) = results
    mean, largest, gradient = CLOSE[dtype]
    assert (a - b).abs().mean() < mean
    assert (a - b).abs().max() < largest
    assert (grad_a - grad_b).norm() < gradient * grad_b.norm()


def test_engine_and_trainer_agree_in_float32(folder):
    model, tokenizer = load(folder, torch.float32, "cuda"), load_tokenizer(folder)
    engine = TorchEngine(model, 4, tokenizer.mask_token_id, stop_ids(tokenizer))
    prompts = [list(range(1, 5 + n)) for n in range(20)]
    rollouts = engine.generate(prompts, list(range(20)), Decoding(max_tokens=40))
    rows = pack([replay(r, 4, 1.0) for r in rollouts], 4, tokenizer.mask_token_id, 4096)
    for row in rows:
        row = row.to("cuda")
        with torch.no_grad():
            gap = (model.score(row, Sampling()).logprobs - row.engine_logprobs).abs().max()
        assert gap < 1e-3


@pytest.mark.parametrize(("dtype", "engine"), [("float32", "torch"), ("bfloat16", "auto")])
def test_both_scripts_run(tmp_path, dtype, engine):
    write_task(tmp_path)
    common = [f"dtype={dtype}", "steps=2", "token_budget=4096"]
    out = f"{tmp_path}/sft"
    run_sft(f"data={tmp_path}/sft.jsonl", f"out={out}", "batch_size=8", *common)
    run_dipo(  # the model is nearly uniform: with this threshold its answers differ in speed
        f"model={out}/latest", f"data={tmp_path}/rl.jsonl", f"out={tmp_path}/dipo", "groups=2",
        "group_size=4", "rewards.speed=1.0", "likelihood=exact", "updates=2", "threshold=0.01",
        f"engine={engine}", "cache_gib=1", *common,
    )  # fmt: skip
    lines = (tmp_path / "dipo" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert all(np.isfinite(json.loads(line)["gap_max"]) for line in lines)


@pytest.mark.parametrize(
    "options",
    [["dtype=bfloat16", "cpu_offload=true"], ["dtype=bfloat16", "checkpointing=full"]],
    ids=["offload", "checkpointing"],
)
def test_a_run_resumes_with_its_moments(tmp_path, options):
    write_task(tmp_path)
    out = tmp_path / "run"
    command = [f"data={tmp_path}/sft.jsonl", f"out={out}", "batch_size=8", "token_budget=256", *options]
    run_sft(*command, "steps=2")
    run_sft(*command, "steps=4", "resume=true")
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4
    moments = load_file(out / "latest" / "optimizer.safetensors")
    assert moments["step"].item() == 4, "AdamW counts on from where it was"
    assert all(tensor.isfinite().all() for tensor in moments.values())


# ------------------------------------------------------------------------------------ LMDeploy

lmdeploy = pytest.mark.skipif(bool(lmdeploy_problem()), reason=lmdeploy_problem())


@lmdeploy
def test_a_least_length_and_banned_tokens(folder, tmp_path):
    engine = gpu.start(folder, tmp_path / "log")
    engine.stop_ids, banned = list(range(0, 250, 8)), set(range(1, 250, 2))
    how = Decoding(max_tokens=64, min_tokens=20, banned_ids=sorted(banned))
    rollouts = engine.generate(gpu.PROMPTS * 3, range(36), how)
    engine.close()
    assert not any(set(r.response_ids) & banned for r in rollouts)
    assert all(r.num_tokens > 20 for r in rollouts)
    assert any(r.finish_reason == "stop" for r in rollouts), "stop tokens come back after the least length"


@pytest.mark.parametrize(("how", "compiled"), [("none", True), ("selective", True), ("full", False)])
def test_layers_compiled_and_checkpointed(folder, how, compiled):
    """Float32 gradients as of plain layers, and nothing is compiled after the third batch."""
    plain, model = load(folder, torch.float32, "cuda"), load(folder, torch.float32, "cuda")
    checkpoint_layers(model, how)
    if compiled:
        compile_layers(model)
    counters = torch._dynamo.utils.counters["stats"]
    for batch, size in enumerate([300, 500, 900, 412]):
        row = packed_row(folder, [size, 36])
        gradients = []
        for network, attention in ((model, "flex"), (plain, "dense")):
            network.zero_grad()
            before = counters["unique_graphs"]
            (network.score(row, Sampling(), attention).logprobs * row.weights).mean().backward()
            assert batch < 3 or counters["unique_graphs"] == before, f"batch {batch} was compiled again"
            gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
        mine, theirs = gradients
        assert (mine - theirs).norm() < 1e-3 * theirs.norm()


def test_the_mask_is_built_without_waiting_for_the_gpu(folder):
    row = packed_row(folder, [2000, 4000, 36])
    block_mask(row)
    torch.cuda.set_sync_debug_mode("error")
    try:
        block_mask(row)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("holds", [False, True])
@pytest.mark.parametrize("scored", [40, 1000])
def test_scoring_in_chunks_equals_autograd(monkeypatch, scored, holds):
    monkeypatch.setattr(kernels, "SCORING_BYTES", 8 * 300 * 5000)
    problem = scoring.Problem(scored, 5000, 64, torch.float32, "cuda")
    targets = problem.some_held if holds else problem.targets
    mine = problem.gradients(lambda: problem.model(targets))
    theirs = problem.gradients(lambda: problem.plain(targets))
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).norm() < 1e-4 * b.norm()


@pytest.mark.parametrize("holds", [False, True])
def test_scoring_memory_at_real_size(holds):
    """8,192 positions of 151,936 logits: under 1.5 GiB next to the gradients, which are held once."""
    problem = scoring.Problem(8192, 151936, 1024, torch.bfloat16, "cuda")
    targets = problem.some_held if holds else problem.targets
    problem.gradients(lambda: problem.model(targets))
    problem.hidden.grad = problem.head.grad = None
    peak = scoring.peak_bytes(lambda: problem.gradients(lambda: problem.model(targets)), "cuda")
    assert peak - problem.hidden.nbytes - problem.head.nbytes < 1.5 * 2**30
