"""LMDeploy's own CUDA back end in Triton's interpreter, against the embedded engine.

One engine for the whole file; it captures for batches of 1, 2 and 4. The file takes 54 s of one core.
"""

import os
import random
from pathlib import Path

import pytest
import torch

import model
from masking import pack, replay
from plumbing.checkpoint import load_tokenizer, tiny
from rollout import Decoding, LMDeployEngine, TorchEngine

pytest.importorskip("lmdeploy", reason="pip install --no-deps -r requirements-lmdeploy.txt")
triton = pytest.importorskip("triton", reason="pip install --no-deps -r requirements-lmdeploy.txt")
if tuple(map(int, triton.__version__.split(".")[:2])) > (3, 8):
    pytest.skip(
        "LMDeploy's prefill needs block pointers, which Triton 3.9 has no more", allow_module_level=True
    )

HERE = Path(__file__).parent
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "head_dim": 16,
    "initializer_range": 0.3,
}
STOPS = list(range(0, 256, 9))
KERNELS = {
    "add_rms_norm_kernel",
    "apply_rotary_pos_emb_qk_kernel",
    "_fill_kv_cache_kernel",
    "_flatten_kv_cache",
    "_flash_prefill_fwd_kernel",
    "_fwd_grouped_split_kernel",
    "_reduce_split_kernel",
    "_silu_and_mul_kernel",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two checkpoints of one shape."""
    root = tmp_path_factory.mktemp("checkpoints")
    return [tiny(root / str(seed), seed=seed, **SHAPE) for seed in (1, 2)]


@pytest.fixture(scope="module")
def engine(folders, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LMDeployEngine, "setup", "lmdeploy_interpreted:install")
        patch.setenv(
            "PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        )
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TRITON_INTERPRET", "1")  # before Triton is imported
        patch.setenv("LMDEPLOY_FAKE_CUDA_GRAPH_CAPTURE", "1")
        mask_id = load_tokenizer(str(folders[0])).mask_token_id
        log, options = tmp_path_factory.mktemp("log") / "engine.log", {"num_gpu_blocks": 16}
        engine = LMDeployEngine(folders[0], 4, mask_id, STOPS, 4, "float32", log=log, options=options)
    yield engine
    engine.close()


def embedded(folder) -> TorchEngine:
    return TorchEngine(model.load(folder), 4, load_tokenizer(str(folder)).mask_token_id, STOPS)


def prompts_of(*lengths) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(256) for _ in range(n)] for n in lengths]


def shown(rollout) -> tuple:
    return rollout.response_ids, rollout.steps, rollout.num_tokens, rollout.finish_reason


def captures(engine) -> int:
    return engine.log.read_text().count("graph captured")


# Three requests run as a batch of four. Prompts end inside a block, with one, and beyond a page of 64 tokens.
LENGTHS = (3, 8, 66)


@pytest.mark.parametrize("rule", ["dynamic", "static"])
def test_greedy_rollouts_equal_the_embedded_engines(engine, folders, rule):
    how = Decoding(top_k=1, rule=rule, threshold=0.4, denoising_steps=2, max_tokens=9, holds=True)
    rollouts = engine.generate(prompts_of(*LENGTHS), range(3), how)
    expected = embedded(folders[0]).generate(prompts_of(*LENGTHS), range(3), how)
    for one, other in zip(rollouts, expected, strict=True):
        assert shown(one) == shown(other)
        for ours, theirs in zip(one.hold_bounds, other.hold_bounds, strict=True):  # log p, of unlike tokens
            assert ours == pytest.approx(theirs, abs=1e-4)
    assert any(any(bounds) for r in expected for bounds in r.hold_bounds)


def test_the_kernels_are_lmdeploys_own(engine):
    engine.generate(prompts_of(5), [0], Decoding(max_tokens=4))
    log = engine.log.read_text()
    assert {
        line.split()[-1] for line in log.splitlines() if "kernel _" in line or "kernel a" in line
    } == KERNELS
    assert captures(engine) == 3


def test_sampled_rollouts(engine, folders, monkeypatch):
    monkeypatch.setattr(engine, "stop_ids", [])
    (prompt,) = prompts_of(6)
    how, seeds = Decoding(max_tokens=6, threshold=0.2), [1, 2, 1 + 2**32, 1 + 2**40, 1]
    rollouts = engine.generate([prompt] * 5, seeds, how)  # one of them waits for a place
    assert len({tuple(r.response_ids) for r in rollouts}) == 4
    assert shown(rollouts[0]) == shown(rollouts[4])
    assert shown(rollouts[3]) == shown(engine.generate([prompt], [1 + 2**40], how)[0])
    trainer = embedded(folders[0])
    for row in pack([replay(r, 4, 1.0) for r in rollouts], 4, trainer.mask_id, 8192):
        with torch.no_grad():
            scores = trainer.model.score(row, how)
        assert (scores.logprobs - row.engine_logprobs).abs().max() < 1e-4


def test_new_weights_in_place_and_after_sleep(engine, folders):
    how, prompts = Decoding(top_k=1, threshold=0.0, max_tokens=5), prompts_of(3, 6, 2)
    expected = [[shown(r) for r in embedded(f).generate(prompts, range(3), how)] for f in folders]
    assert expected[0] != expected[1]

    def answers() -> list[tuple]:
        return [shown(r) for r in engine.generate(prompts, range(3), how)]

    captured = captures(engine)
    engine.update_weights(model.load(folders[1]).named_parameters())
    assert answers() == expected[1]
    assert captures(engine) == captured, "the same buffers"
    engine.sleep()
    engine.update_weights(model.load(folders[0]).named_parameters())
    engine.wake()
    assert answers() == expected[0]
    assert captures(engine) == captured + 3, "captured again for the new weights and cache"
