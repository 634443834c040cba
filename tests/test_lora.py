"""LoRA: only adapters are trained, and everybody else sees the sum."""

import numpy as np
import pytest
import torch
from conftest import TINY
from data_rows import write_task
from safetensors.torch import load_file

import dipo
import model
import sft
from masking import noise, pack
from model import Sampling
from plumbing.common import InputError, read_records
from plumbing.config import load_config
from plumbing.lora import add_adapters

pytest.importorskip("peft")


def train(folder, data, out, *more) -> None:
    """SFT with adapters, as sft.py is called."""
    common = ["lora_rank=4", "lr=1e-2", "batch_size=4", f"data={data}/sft.jsonl", f"model={folder}"]
    sft.main(load_config(sft.SFTConfig, [*common, f"out={out}", *more]))


def test_the_checkpoint_is_the_sum_of_weights_and_adapters(tiny_folder, tmp_path):
    write_task(tmp_path)
    train(tiny_folder, tmp_path, tmp_path / "run", "steps=2")
    saved = load_file(tmp_path / "run/latest/model.safetensors")
    adapters = load_file(tmp_path / "run/latest/adapters.safetensors")
    moved = 0
    for name, before in load_file(tiny_folder / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        a, b = (adapters.get(f"{layer}.lora_{kind}.default.weight") for kind in "AB")
        delta = torch.zeros_like(before) if a is None else 2 * (b @ a)  # alpha / rank = 2
        assert torch.allclose(saved[name], before + delta, atol=1e-6)
        moved += bool(delta.abs().max() > 1e-3)
    assert moved == 7 * TINY["num_hidden_layers"], "every projection of every layer"
    moments = load_file(tmp_path / "run/latest/optimizer.safetensors")
    assert len(moments) == 1 + 2 * len(adapters), "of the adapters only"


def test_gradients_are_those_of_the_sum(tiny_folder):
    plain, adapted = model.load(str(tiny_folder)), model.load(str(tiny_folder))
    add_adapters(adapted, 4)
    torch.manual_seed(0)
    layer = adapted.model.layers[1].mlp.up_proj
    layer.lora_B["default"].weight.data.normal_()
    merged = plain.model.layers[1].mlp.up_proj.weight
    merged.data += layer.get_delta_weight("default")
    (row,) = pack([noise(list(range(40)), 8, 4, np.random.default_rng(0))], 4, 259, 999)
    ours, theirs = adapted.score(row, Sampling()).logprobs, plain.score(row, Sampling()).logprobs
    assert torch.allclose(ours, theirs, atol=1e-4)
    ours.sum().backward()
    theirs.sum().backward()
    expected = 2 * merged.grad @ layer.lora_A["default"].weight.T
    assert torch.allclose(layer.lora_B["default"].weight.grad, expected, rtol=1e-3, atol=1e-4)


def test_resumed_is_never_interrupted(tiny_folder, tmp_path):
    write_task(tmp_path)
    train(tiny_folder, tmp_path, tmp_path / "whole", "steps=4")
    train(tiny_folder, tmp_path, tmp_path / "parts", "steps=2")
    train(tiny_folder, tmp_path, tmp_path / "parts", "steps=4", "resume=true")
    for name in ("model", "adapters", "optimizer"):
        whole, parts = (
            load_file(tmp_path / run / f"latest/{name}.safetensors") for run in ("whole", "parts")
        )
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_the_engine_gets_the_sum(tiny_folder, tmp_path):
    write_task(tmp_path)
    argv = [
        f"model={tiny_folder}", f"data={tmp_path}/rl.jsonl", f"out={tmp_path}/run", "lora_rank=4", "steps=3",
        "groups=2", "group_size=4", "rewards={accuracy: 0.0, speed: 1.0}", "lr=1e-2", "threshold=0.4",
        "max_tokens=16", "kl_beta=0.1", "engine=torch",
    ]  # fmt: skip
    dipo.main(load_config(dipo.DiPOConfig, argv))
    metrics = [record for _, record in read_records(tmp_path / "run/metrics.jsonl")]
    assert max(m["gap_max"] for m in metrics) < 1e-4
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-8)
    assert metrics[2]["kl"] > 1e-6, "the policy moved away from the reference"


def test_offloading_frozen_weights_is_refused(tiny_folder, tmp_path):
    with pytest.raises(InputError, match="config key cpu_offload: with lora_rank"):
        train(tiny_folder, tmp_path, tmp_path / "run", "steps=2", "cpu_offload=true")
    assert not (tmp_path / "run").exists(), "nothing is started"
