"""What benchmarks/memory.py predicts is what is measured here: parameters, moments, activations, FLOPs."""

import dataclasses
import json
import random
import sys

import layout
import memory
import pytest
import torch
from conftest import random_rollout
from torch.utils.flop_counter import FlopCounterMode

from masking import dense_mask, pack, replay
from model import Sampling, attention_over
from plumbing.common import InputError
from plumbing.config import load_config
from plumbing.kernels import checkpoint_layers

DENSE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,  # as many as queries: dense attention then keeps what FlexAttention keeps
    "head_dim": 48,
    "vocab_size": 300,
    "tie_word_embeddings": False,
}
MOE = DENSE | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 160}


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("1.7B", 1_720_574_976),
        ("4B", 4_022_468_096),
        ("8B", 8_190_735_360),
        ("30B-A3B", 30_532_122_624),
    ],
)
def test_parameters_are_those_of_the_published_models(name, published):
    config = memory.model_config(name)
    size = memory.parameters(config)
    model = memory.build(config, "meta", torch.bfloat16)
    assert size["all"] == published == sum(p.numel() for p in model.parameters())
    assert size["layer"] == sum(p.numel() for p in model.model.layers[0].parameters())
    assert size["rest"] == published - config.num_hidden_layers * size["layer"]


def small(fields: dict = DENSE):
    """A shape, and its network on the CPU."""
    torch.manual_seed(0)
    kind = memory.Qwen3MoeConfig if "num_experts" in fields else memory.sdar.SDARConfig
    config = kind(**fields)
    dtype = torch.bfloat16 if "num_experts" in fields else torch.float32
    return config, memory.build(config, "cpu", dtype)


def packed_row(blocks: int = 60):
    rollout = random_rollout(random.Random(0), 4, prompt=30, blocks=blocks)
    (row,) = pack([replay(rollout, 4, 1.0)], 4, mask_id=299, token_budget=10**6)
    return row


def forward(model, row):
    """The final hidden states of a packed row [1, N, hidden]."""
    return model.model(
        input_ids=row.ids[None],
        position_ids=row.positions[None],
        use_cache=False,
        attention=attention_over(row, "dense"),
    ).last_hidden_state


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("fields", [DENSE, MOE], ids=["dense", "moe"])
def test_kept_activations_are_those_that_autograd_saves(fields, checkpointing):
    """Within 10 %. On a CPU SDPA keeps the N x N mask too, which FlexAttention does not."""
    config, model = small(fields)
    row, item = packed_row(), model.dtype.itemsize
    checkpoint_layers(model, checkpointing)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = forward(model, row)
    measured = sum(saved.values()) + hidden.nbytes  # the result is alive as well
    if checkpointing == "none":
        measured -= config.num_hidden_layers * item * len(row) ** 2
    else:
        measured += 2 * item * len(row) * config.head_dim  # the rotary tables: arguments of every layer
    predicted, _ = memory.activation_bytes(config, len(row), model.dtype, checkpointing)
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("fields", [DENSE, MOE], ids=["dense", "moe"])
def test_peak_of_a_pass_is_that_of_a_real_one(fields, checkpointing):
    """Within 10 %, counted by the storages that are alive while a real network runs on the CPU."""
    config, model = small(fields)
    row = packed_row()
    checkpoint_layers(model, checkpointing)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with memory.LiveBytes() as live:
        forward(model, row).sum().backward()
    masks = config.num_hidden_layers if checkpointing == "none" else 1
    measured = live.peak - masks * model.dtype.itemsize * len(row) ** 2
    predicted = memory.activation_bytes(config, len(row), model.dtype, checkpointing)
    assert sum(predicted) == pytest.approx(measured, rel=0.1)


def test_live_bytes_counts_each_storage_while_it_is_alive():
    before = torch.ones(1000)
    with memory.LiveBytes() as live:
        a = before + 1  # 4000 bytes
        b = a.view(10, 100).t()  # a view is no memory
        before.add_(1)  # nor is a change in place, of what was there before
        assert live.now == 4000
        c = torch.cat([a, a])
        assert live.now == live.peak == 12000
        del a, c
        assert live.now == 4000, "the view still holds it"
        del b
        assert (live.now, live.peak) == (0, 12000)


def test_a_whole_step_fits_the_plan(tmp_path):
    """One rank in float32, against weights, gradients and moments of a real optimizer step; within 10 %."""
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    plan = memory.PlanConfig(
        model=str(tmp_path), prompt=30, response=242, tpf=2, token_budget=784, ranks=1, trajectories=1,
        dtype="float32", checkpointing="none",
    )  # fmt: skip
    parts, _, _ = memory.predict(plan)
    config, model = small()
    optimizer = torch.optim.AdamW(model.parameters())
    rollout = layout.random_trajectory(30, 242, 2, 4, vocabulary=299)
    (row,) = pack([replay(rollout, 4, 1.0)], 4, 299, 10**6)
    with memory.LiveBytes() as live:
        for _ in range(2):  # the second finds the gradients of the first
            model.score(row, Sampling(), "dense").logprobs.sum().backward()
        gradients = sum(p.grad.nbytes for p in model.parameters())
        optimizer.step()
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert parts["weights, float32"] == sum(p.nbytes for p in model.parameters())
    assert parts["gradients, float32"] == gradients
    assert parts["AdamW's moments, float32"] == pytest.approx(moments, rel=0.01)
    assert parts["gathered units"] == 0
    measured = live.peak - config.num_hidden_layers * 4 * len(row) ** 2 + parts["weights, float32"]
    without_moments = sum(parts.values()) - parts["AdamW's moments, float32"]  # those come later
    assert without_moments == pytest.approx(measured, rel=0.1)


def test_a_plan_shards_over_ranks():
    plan = memory.PlanConfig(model="small", reduce_once=False)  # ratios are the same of every model
    one, two, whole, one_pass = (
        memory.predict(dataclasses.replace(plan, **changes))[0]
        for changes in (
            {"ranks": 4},
            {"ranks": 8},
            {"ranks": 8, "reduce_once": True},
            {"ranks": 8, "reduce_once": True, "trajectories": 8},
        )
    )
    gradients = "gradients, float32"
    assert whole[gradients] == 8 * two[gradients] == 8 * one_pass[gradients]
    for part in ("weights, float32", "gradients, float32", "AdamW's moments, float32"):
        assert one[part] == 2 * two[part]
    assert one["gathered units"] == two["gathered units"] > 0


def test_flops_are_those_that_the_counter_sees():
    config, model = small()
    row = packed_row()
    with FlopCounterMode(display=False) as counter:
        model.score(row, Sampling(), "dense").logprobs.sum().backward()
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert memory.forward_backward_flops(config, len(row), 0, len(row.scored)) == products
    pairs = memory.visible_pairs(row.block, 4)
    assert pairs == dense_mask(row).sum()
    attention = memory.forward_backward_flops(config, 0, pairs, 0)
    assert attention == 3 * 4 * pairs * 4 * 48 * 5, "two products forward, four backward; heads, D, layers"


def test_a_planned_trajectory_is_as_long_as_a_real_one():
    rollout = layout.random_trajectory(126, 898, 2.5, 4, vocabulary=256)
    (row,) = pack([replay(rollout, 4, 1.0)], 4, 299, 10**6)
    planned = memory.packed_trajectory(126, 898, rollout.tokens_per_forward, 4)
    assert planned == pytest.approx((len(row), memory.visible_pairs(row.block, 4)), rel=0.02)


def run(*arguments: str) -> None:
    memory.main(load_config(memory.PlanConfig, list(arguments)))


def test_the_verdict(capsys):
    run("model=1.7B", "ranks=8", "trajectories=8")
    printed = capsys.readouterr().out
    assert ": fits in 139 GiB" in printed and "| kept activations of 49,152 tokens | training |" in printed
    run("model=8B", "ranks=1", "trajectories=8")
    assert ": does not fit in 139 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["model=9B"], "config key model: 9B"),
        (["tpf=5"], "config key tpf"),
        (["ranks=0"], "config key ranks"),
        (["gpu_gib=nan"], "config key gpu_gib"),
        (["utilisation=40"], "config key utilisation"),
        (["checkpointing=some"], "config key checkpointing"),
        (["rank=8"], "config key rank"),
    ],
)
def test_bad_values_are_named(arguments, named):
    with pytest.raises(InputError, match=named):
        run(*arguments)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"hidden_size": "big"}'])
def test_a_bad_config_file_is_named(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(InputError, match=str(file)):
        run(f"model={file}")


def test_bad_input_is_one_line_and_exit_code_2(zygote):
    done = zygote.run([sys.executable, memory.__file__, "ranks=0"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: config key ranks: 0, expected more than 0\n"
