"""What plumbing/gpu.py predicts is what is measured here: parameters, moments, activations, FLOPs; and what
it makes of them: plans, refusals, the engine's cache."""

import dataclasses
import importlib.util
import json
import multiprocessing
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
from plumbing import gpu
from plumbing.common import ROOT, InputError
from plumbing.kernels import checkpoint_layers
from plumbing.lmdeploy_engine import LMDeployProcess
from plumbing.run_folder import make_optimizer
from sft import SFTConfig

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
    size = gpu.parameters(config)
    model = gpu.build(config, "meta", torch.bfloat16)
    assert size["all"] == published == sum(p.numel() for p in model.parameters())
    assert size["layer"] == sum(p.numel() for p in model.model.layers[0].parameters())
    assert size["rest"] == published - config.num_hidden_layers * size["layer"]


def small(fields: dict = DENSE):
    """A shape, and its network on the CPU."""
    torch.manual_seed(0)
    kind = memory.Qwen3MoeConfig if "num_experts" in fields else memory.sdar.SDARConfig
    config = kind(**fields)
    dtype = torch.bfloat16 if "num_experts" in fields else torch.float32
    return config, gpu.build(config, "cpu", dtype)


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
    predicted, _ = gpu.activation_bytes(config, len(row), str(model.dtype)[6:], checkpointing)
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
    with gpu.LiveBytes() as live:
        forward(model, row).sum().backward()
    masks = config.num_hidden_layers if checkpointing == "none" else 1
    measured = live.peak - masks * model.dtype.itemsize * len(row) ** 2
    predicted = gpu.activation_bytes(config, len(row), str(model.dtype)[6:], checkpointing)
    assert sum(predicted) == pytest.approx(measured, rel=0.1)


def test_live_bytes_counts_each_storage_while_it_is_alive():
    before = torch.ones(1000)
    with gpu.LiveBytes() as live:
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


def job(shape, **changes) -> gpu.Job:
    """A DiPO job of one process on a CPU's terms, with changes."""
    fields = {
        "ranks": 1, "dtype": "float32", "token_budget": 784, "checkpointing": "none", "reduce_once": True,
        "cpu_offload": False, "lora_rank": 0, "reference": False, "engine": "lmdeploy", "max_batch": 16,
        "cache_gib": 0.0, "block_size": 4, "longest": 272,
    }  # fmt: skip
    return gpu.Job(shape=shape, **fields | changes)


def test_a_whole_step_fits_the_plan():
    """One rank in float32, against weights, gradients and moments of a real optimizer step; within 10 %."""
    config, model = small()
    optimizer = torch.optim.AdamW(model.parameters())
    rollout = layout.random_trajectory(30, 242, 2, 4, vocabulary=299)
    (row,) = pack([replay(rollout, 4, 1.0)], 4, 299, 10**6)
    parts = gpu.plan(job(config, token_budget=len(row)), 2**40)["train"]
    with gpu.LiveBytes() as live:
        for _ in range(2):  # the second finds the gradients of the first
            model.score(row, Sampling(), "dense").logprobs.sum().backward()
        gradients = sum(p.grad.nbytes for p in model.parameters())
        optimizer.step()
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert parts["weights, float32"] == sum(p.nbytes for p in model.parameters())
    assert parts["gradients, float32"] == gradients
    assert parts["AdamW's moments, float32"] == pytest.approx(moments, rel=0.01)
    assert parts["gathered units"] == 0
    passes = ("weights, float32", "gradients, float32", "working memory of a layer")
    logits = 3 * 4 * len(row.scored) * config.vocab_size  # few: plainly, with two copies
    predicted = sum(parts[name] for name in passes) + parts[f"kept activations of {len(row)} tokens"] + logits
    measured = live.peak - config.num_hidden_layers * 4 * len(row) ** 2 + parts["weights, float32"]
    assert predicted == pytest.approx(measured, rel=0.1)


def test_a_plan_shards_over_ranks():
    shape = memory.model_config("small")  # ratios are the same of every model
    plans = []
    for changes in (
        {"ranks": 4, "reduce_once": False},
        {"ranks": 8, "reduce_once": False},
        {"ranks": 8},
        {"ranks": 8, "one_pass": True},
    ):
        plans.append(gpu.plan(job(shape, **changes), 2**40)["train"])
    one, two, whole, one_pass = plans
    gradients = "gradients, float32"
    assert whole[gradients] == 8 * two[gradients] == 8 * one_pass[gradients]
    for part in ("weights, float32", "gradients, float32", "AdamW's moments, float32"):
        assert one[part] == 2 * two[part]
    assert one["gathered units"] == two["gathered units"] > 0


@pytest.mark.parametrize(
    ("changes", "phase", "gone", "come"),
    [
        ({"cpu_offload": True}, "update", ["weights, float32", "AdamW's moments, float32"], []),
        ({"lora_rank": 8}, "train", ["weights, float32"], ["frozen weights, float32"]),
        ({"reference": True}, "rollout", [], ["reference, float32"]),
        ({"engine": "torch"}, "rollout", ["writing a checkpoint"], ["engine: logits and probabilities"]),
    ],
    ids=["offload", "lora", "reference", "torch"],
)  # fmt: skip
def test_fields_change_the_plan(changes, phase, gone, come):
    shape = memory.model_config("small")
    before, after = gpu.plan(job(shape), 2**40)[phase], gpu.plan(job(shape, **changes), 2**40)[phase]
    assert not after.keys() & set(gone) and before.keys() >= set(gone)
    assert after.keys() >= set(come) and not before.keys() & set(come)


def test_adapters_are_counted_as_peft_makes_them():
    from plumbing.lora import add_adapters

    pytest.importorskip("peft")
    config, model = small()
    add_adapters(model, 8)
    made = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert gpu.adapter_parameters(config, 8) == made


def test_without_an_engine_there_is_only_training():
    assert list(gpu.plan(job(memory.model_config("small"), engine=""), 2**40)) == ["train"]


@pytest.mark.parametrize("fields", [DENSE, MOE], ids=["dense", "moe"])
def test_the_largest_parameter(fields):
    config, model = small(fields)
    assert gpu.parameters(config)["largest"] == max(p.numel() for p in model.parameters())


def test_8b_on_eight_h200_fits_at_every_step():
    """The engine's cache is what remains beside the trainer at rest: all phases fit, and a larger one not."""
    shape = memory.model_config("8B")
    eight = {
        "ranks": 8,
        "dtype": "bfloat16",
        "token_budget": 49152,
        "checkpointing": "full",
        "max_batch": 256,
    }
    planned = job(shape, **eight, longest=9216)
    h200 = 139.8 * gpu.GIB
    phases = gpu.plan(planned, h200)
    assert all(sum(parts.values()) <= h200 for parts in phases.values())
    cache = phases["rollout"]["engine: cache"]
    assert 0.9 * h200 < sum(phases["rollout"].values()), "nearly all of the GPU is used"
    assert not gpu.problem(planned, h200)
    too_much = dataclasses.replace(planned, cache_gib=cache / gpu.GIB + 10)
    found = gpu.problem(too_much, h200)
    assert found.startswith(f"config key cache_gib: {too_much.cache_gib}") and "in the rollout phase" in found


def test_a_small_model_takes_no_more_cache_than_its_requests_can_fill():
    shape = memory.model_config("small")
    cache = gpu.plan(job(shape), 10**12)["rollout"]["engine: cache"]
    assert cache == 16 * shape.max_position_embeddings * 2 * 4 * 2 * 64 * 2  # K V, layers, heads, dim, bytes


@pytest.mark.parametrize(
    ("changes", "gib", "advice"),
    [
        ({"checkpointing": "none"}, 35, "config key checkpointing: none"),
        ({}, 25, "config key reduce_once: True"),
        ({"reduce_once": False, "token_budget": 65536}, 30, "config key token_budget: 65536"),
        ({"max_batch": 8192}, 30, "config key max_batch: 8192"),
        ({"cache_gib": 40.0}, 35, "config key cache_gib: 40.0"),
        ({"ranks": 1}, 25, "config key lora_rank: 0"),
        ({"ranks": 2}, 22, "config key cpu_offload: False"),
        ({"ranks": 1}, 5, "config key model"),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_refused_with_what_would(changes, gib, advice):
    """Whatever is advised fits, and the config as it is does not."""
    shape = memory.model_config("8B")
    shape.num_hidden_layers = 4  # for speed
    usual = {"ranks": 8, "dtype": "bfloat16", "token_budget": 16384, "checkpointing": "full", "longest": 2048}
    planned = job(shape, **usual | changes)
    found = gpu.problem(planned, gib * gpu.GIB)
    assert found.startswith(advice), found
    assert f"the GPU has {gib:.1f}" in found
    if "would fit" in found:
        changed = {}
        for pair in found.rpartition("; ")[2].split()[:-2]:
            name, _, value = pair.partition("=")
            changed[name] = value if name == "checkpointing" else json.loads(value)
        assert not gpu.shortage(dataclasses.replace(planned, **changed), gib * gpu.GIB)
    assert gpu.shortage(planned, gib * gpu.GIB)


class Owner:
    """An engine that says in which order it is asked, among the trainer's own calls."""

    def __init__(self, patch):
        self.calls: list[str] = []
        patch.setattr(gpu, "rest", lambda: self.calls.append("trainer at rest"))

    def sleep(self) -> int:
        self.calls.append("sleep")
        return 3 * gpu.GIB

    def update_weights(self, weights) -> None:
        self.calls.append(f"weights: {list(weights)}")

    def wake(self) -> None:
        self.calls.append("wake")


def test_the_trainer_is_at_rest_before_the_engine_takes_memory(monkeypatch):
    """Before the weights travel; and before the cache comes, since their bucket was the trainer's."""
    engine = Owner(monkeypatch)
    assert gpu.to_trainer(engine)["gib_given_back"] == 3
    gpu.to_engine(engine, iter([("a", 1)]))
    assert engine.calls == ["sleep", "trainer at rest", "weights: [('a', 1)]", "trainer at rest", "wake"]


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_moments_are_there_before_the_first_step(lora_rank):
    """Where the first step would make them, and it is the step of an optimizer without them, bit for bit."""
    from plumbing.lora import add_adapters

    stepped = []
    for ours in (True, False):
        _, model = small()
        if lora_rank:
            add_adapters(model, lora_rank)
        trained = [p for p in model.parameters() if p.requires_grad]
        plain = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
        optimizer = make_optimizer(model, SFTConfig(lr=1e-3, weight_decay=0.1)) if ours else plain
        assert len(optimizer.state) == (len(trained) if ours else 0)
        for number, parameter in enumerate(trained):
            generator = torch.Generator().manual_seed(number)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        made = {id(t) for state in optimizer.state.values() for t in state.values()}
        for _ in range(2):
            optimizer.step()
        assert not ours or made == {id(t) for state in optimizer.state.values() for t in state.values()}
        stepped.append(([p.detach() for p in trained], optimizer.state_dict()["state"]))
    (weights, state), (plain_weights, plain_state) = stepped
    assert all(map(torch.equal, weights, plain_weights))
    for number, of_parameter in plain_state.items():
        assert state[number].keys() == of_parameter.keys()
        assert all(torch.equal(state[number][key], value) for key, value in of_parameter.items())


def test_a_config_that_cannot_fit_is_refused(tiny_folder, monkeypatch):
    """On a pretended GPU: what is free there decides."""
    config = SFTConfig(model=str(tiny_folder), eval_every=1)
    gpu.check_memory(config, tiny_folder)  # no GPU: nothing to check
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 * gpu.GIB, 80 * gpu.GIB))
    with pytest.raises(
        InputError, match=r"config key model: it needs .* the GPU has 2.6 .check_memory=false"
    ):
        gpu.check_memory(config, tiny_folder)
    gpu.check_memory(dataclasses.replace(config, check_memory=False), tiny_folder)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 * gpu.GIB, 80 * gpu.GIB))
    gpu.check_memory(config, tiny_folder)


def lmdeploy_without_process(shape, monkeypatch, free_gib: float) -> LMDeployProcess:
    """The parent's side on a pretended GPU with so much free; nothing is started."""
    engine = LMDeployProcess.__new__(LMDeployProcess)
    engine.config, engine.positions = shape.to_dict(), shape.max_position_embeddings
    engine.dtype, engine.device, engine.block_size = "bfloat16", 0, 4
    engine.max_batch, engine.cache_gib, engine.log = 256, 0.0, "engine.log"
    network = gpu.build(shape, "meta", torch.bfloat16)
    engine._shapes = {name: list(p.shape) for name, p in network.named_parameters()}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free_gib * gpu.GIB), int(139.8 * gpu.GIB)))
    return engine


def test_the_engine_takes_as_cache_what_the_plan_says(monkeypatch):
    """Of what is free when it starts, also when it has to be started again."""
    shape = memory.model_config("1.7B")
    planned = job(shape, ranks=8, dtype="bfloat16", max_batch=256, longest=9216)
    at_rest = sum(gpu.parts_at_rest(planned).values()) / gpu.GIB
    page = 64 * gpu.cache_bytes_per_token(shape, 2)
    for gib in (139.8, 60.0):
        wanted = gpu.plan(planned, gib * gpu.GIB)["rollout"]["engine: cache"]
        engine = lmdeploy_without_process(shape, monkeypatch, gib - at_rest)
        assert engine._engine_options()["num_gpu_blocks"] == int(wanted // page)
    engine.cache_gib = 7
    assert engine._engine_options()["num_gpu_blocks"] == 7 * gpu.GIB // page
    engine = lmdeploy_without_process(memory.model_config("small"), monkeypatch, 100)
    assert engine._engine_options()["num_gpu_blocks"] == 256 * engine.positions // 64, (
        "no more than can be used"
    )


def test_an_engine_without_room_for_a_cache_is_refused(monkeypatch):
    engine = lmdeploy_without_process(memory.model_config("1.7B"), monkeypatch, 5)
    with pytest.raises(InputError, match=r"config key max_batch: 256, and no room is left .* \(-"):
        engine._engine_options()


def test_an_engine_out_of_memory_says_which_field(monkeypatch):
    """The child's traceback becomes one line."""
    engine = lmdeploy_without_process(memory.model_config("1.7B"), monkeypatch, 8)
    engine._connection, child = multiprocessing.Pipe()
    engine._process = None
    child.send(
        ("error", "Traceback ...\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 50 GiB")
    )
    with pytest.raises(
        InputError, match="config key cache_gib: 0.0: the rollout process is out of GPU memory"
    ):
        engine._receive(1.0)


def test_docs_memory_md_is_what_the_plan_says():
    spec = importlib.util.spec_from_file_location("docs_memory", ROOT / "docs/memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs/memory.md").read_text() == module.document(), "stale: python docs/memory.py"


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
    planned = memory.packed_sequence(126, 898, 4 / rollout.tokens_per_forward, 4)
    assert planned == pytest.approx((len(row), memory.visible_pairs(row.block, 4)), rel=0.02)


def run(*arguments: str) -> None:
    memory.main(memory.parse(list(arguments)))


def test_the_verdict(capsys):
    run("dipo", "model=1.7B", "ranks=8", "dtype=bfloat16")
    printed = capsys.readouterr().out
    assert (
        "8 GPUs of 139.8 GiB: fits." in printed and "| train | kept activations of 16,384 tokens |" in printed
    )
    assert "full responses" in printed
    run("sft", "model=8B", "ranks=1", "dtype=bfloat16")
    assert "does not fit: config key" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "expected sft or dipo first"),
        (["grpo"], "grpo: expected sft or dipo first"),
        (["sft", "model=9B"], "config key model: 9B"),
        (["dipo", "tpf=5"], "config key tpf"),
        (["dipo", "ranks=0"], "config key ranks"),
        (["dipo", "gpu_gib=nan"], "config key gpu_gib"),
        (["sft", "utilisation=40"], "config key utilisation"),
        (["sft", "checkpointing=some"], "config key checkpointing"),
        (["sft", "rank=8"], "config key rank"),
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
        run("sft", f"model={file}")


def test_bad_input_is_one_line_and_exit_code_2(zygote):
    done = zygote.run([sys.executable, memory.__file__, "dipo", "ranks=0"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: config key ranks: 0, expected more than 0\n"
