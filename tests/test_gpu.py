"""The CUDA path: `pytest -m gpu`. Skipped without CUDA."""

import json

import numpy as np
import pytest
import torch
from data_rows import write_task
from safetensors.torch import load_file

import dipo
import sft
from masking import noise, pack
from model import Sampling, load, load_tokenizer, stop_ids, tiny
from rollout import Decoding, TorchEngine

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


@pytest.mark.parametrize(
    "options",
    [["dtype=float32"], ["dtype=bfloat16", "cpu_offload=true"], ["dtype=bfloat16", "checkpointing=full"]],
    ids=["float32", "offload", "checkpointing"],
)
def test_a_run_resumes_with_its_moments(tmp_path, options):
    write_task(tmp_path)
    out = tmp_path / "run"
    command = [f"data={tmp_path}/sft.jsonl", f"out={out}", "batch_size=8", "token_budget=256", *options]
    sft.main([*command, "steps=2"])
    sft.main([*command, "steps=4", "resume=true"])
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4
    moments = load_file(out / "latest" / "optimizer.safetensors")
    assert moments["step"].item() == 4, "AdamW counts on from where it was"
    assert all(tensor.isfinite().all() for tensor in moments.values())
