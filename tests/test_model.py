"""The packed pass against per-round passes, causal Qwen3 and a forward written out by hand."""

import dataclasses
import json
import math
import random

import layout
import numpy as np
import pytest
import scoring
import torch
import torch.nn.functional as F
from conftest import TINY, WORDS, random_rollout
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import model as sdar
from masking import HOLD, Packed, noise, pack, padded, replay
from model import Sampling, score_logits
from plumbing import kernels
from plumbing.checkpoint import CHAT_TEMPLATE, load_tokenizer, read_copied, save, stop_ids, tiny
from plumbing.common import InputError

MASK = 259  # <|MASK|> in the tiny tokenizer
MOE = {
    "model_type": "sdar_moe",
    "architectures": ["SDARMoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}


def one_row(views: list, block_size: int) -> Packed:
    (row,) = pack(views, block_size, MASK, token_budget=10**9)
    return row


def gradient(network, loss: torch.Tensor) -> torch.Tensor:
    """Of all parameters, as one vector."""
    network.zero_grad()
    loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in network.parameters()]
    return torch.cat([g.flatten() for g in grads])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def clean_row(ids: list[int], block_size: int) -> Packed:
    """Only the clean copy, every position scored as if it were in a view: for the clean pass itself."""
    n = torch.arange(len(ids))
    zero = torch.zeros(len(ids))
    return Packed(
        ids=torch.tensor(ids),
        positions=n,
        sequence=torch.zeros_like(n),
        block=n // block_size,
        view=torch.zeros_like(n),
        scored=n,
        targets=torch.tensor(ids),
        bounds=zero,
        weights=zero,
        advantages=zero,
        source=torch.zeros_like(n),
        engine_logprobs=zero,
        ages=torch.zeros_like(n),
        block_size=block_size,
    )


def logits_of(network, row: Packed, attention: str = "dense") -> torch.Tensor:
    """[M, V] of what is scored."""
    hidden = network.model(
        input_ids=row.ids[None],
        position_ids=row.positions[None],
        use_cache=False,
        attention=sdar.attention_over(row, attention),
    ).last_hidden_state[0]
    return network.lm_head(hidden[row.scored])


# --------------------------------------------------------------------- packed = round by round


@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
@pytest.mark.parametrize("attention", ["dense", "joint"])
def test_packed_equals_rounds(tiny_model, block_size, attention):
    rng = random.Random(block_size)
    prompts = [2 * block_size + (block_size > 1), block_size, 1, 3 * block_size - 1]
    rollouts = [random_rollout(rng, block_size, p, rng.randint(1, 4)) for p in prompts]
    row = one_row([replay(r, block_size, weight=1.0) for r in rollouts], block_size)
    mine = tiny_model.score(row, Sampling(), attention).logprobs

    published = [layout.score_rounds(tiny_model, r, block_size, MASK)[0] for r in rollouts]
    assert max(len(layout.rounds(r, block_size, MASK)) for r in rollouts) >= min(2, block_size)
    prompt_of = torch.tensor([len(r.prompt_ids) for r in rollouts])
    at = row.positions[row.scored] - prompt_of[row.source]
    theirs = torch.stack([published[t][i] for t, i in zip(row.source.tolist(), at.tolist(), strict=True)])
    assert sum(len(r.response_ids) for r in rollouts) == len(mine)
    assert theirs.std() > 1, "the distributions are peaked enough to tell errors"
    assert (mine - theirs).abs().max() < 1e-5
    weights = torch.linspace(-1, 1, len(mine))
    ours = gradient(tiny_model, (mine * weights).sum())
    assert relative(ours, gradient(tiny_model, (theirs * weights).sum())) < 1e-5


def test_a_tiny_config_has_what_the_published_modelling_code_asks_for(tmp_path):
    """Without a default: so that this code, and its forward pass of evaluation, runs on our checkpoints."""
    config = json.loads((tiny(tmp_path, **TINY) / "config.json").read_text())
    asked = """
        attention_bias attention_dropout block_size fuse_cross_entropy head_dim hidden_act hidden_size
        initializer_range intermediate_size mask_token_id max_position_embeddings max_window_layers
        num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps rope_scaling rope_theta
        sliding_window tie_word_embeddings use_sliding_window vocab_size
    """  # what follows `config.` in modeling_sdar.py
    assert set(asked.split()) <= config.keys()
    assert config["fuse_cross_entropy"] is True and config["attention_dropout"] == 0.0


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_joint_row_equals_dense_row(tmp_path, kv_heads, padded):
    network = sdar.load(str(tiny(tmp_path, **TINY | {"num_key_value_heads": kv_heads})))
    rng = np.random.default_rng(0)
    lengths = [24, 40, 12] if padded else [24]
    views = [noise(rng.integers(0, WORDS, n).tolist(), 5, 4, rng, "block", views=2) for n in lengths]
    row = one_row(views, 4)
    assert sdar.JointRow(row).attention.has_padding == padded
    weights = torch.linspace(-1, 1, len(row.scored))
    dense, joint = (network.score(row, Sampling(), a) for a in ("dense", "joint"))
    assert (dense.logprobs - joint.logprobs).abs().max() < 1e-5
    assert (dense.entropy - joint.entropy).abs().max() < 1e-5
    loss = [(s.logprobs * weights).sum() for s in (dense, joint)]
    assert relative(*(gradient(network, one) for one in loss)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, MOE], ids=["", "moe"])
def test_bfloat16_is_near_float32_on_the_cpu(tmp_path, changes):
    folder = tiny(tmp_path / "tiny", **TINY, **changes)
    row = one_row([replay(random_rollout(random.Random(i), 4), 4, 1.0) for i in range(5)], 4)
    exact, rounded = (sdar.load(str(folder), dtype) for dtype in (torch.float32, torch.bfloat16))
    gap = exact.score(row, Sampling()).logprobs - rounded.score(row, Sampling()).logprobs.float()
    assert 1e-4 < gap.abs().mean() < 0.15
    if changes:
        assert exact.config._experts_implementation == "grouped_mm", "not one expert after the other"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_row_equals_dense_row(tiny_model):
    """Forward only: FlexAttention has no backward pass on a CPU. It refuses leaves that want one."""
    tiny_model.requires_grad_(False)
    rng = random.Random(3)
    row = one_row([replay(random_rollout(rng, 4), 4, 1.0, exact=True) for _ in range(5)], 4)
    flex, dense = (tiny_model.score(row, Sampling(), a) for a in ("flex", "dense"))
    assert (flex.logprobs - dense.logprobs).abs().max() < 1e-5


def noised_rows(lengths: list[int]) -> list[Packed]:
    """A row of three sequences for each length, filled up to whole tiles."""
    rng = np.random.default_rng(0)
    rows = []
    for length in lengths:
        sizes = (length, 4 * (length // 8), 36)
        views = [noise(rng.integers(0, WORDS, n).tolist(), 5, 4, rng, "block") for n in sizes]
        rows.append(padded(one_row(views, 4)))
    return rows


@torch.no_grad()
def test_flex_is_compiled_twice_whatever_the_lengths():
    """Once for the first length, once for every other."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(kernels._flex, backend=counter)
    rows = noised_rows([200, 600, 1000, 400, 804])
    assert len({len(row) for row in rows}) == 5
    for row in rows:
        q, k, v = (torch.randn(1, heads, len(row), 16) for heads in (4, 2, 2))
        out = compiled(q, k, v, sdar.FlexRow(row).mask, 0.25, {}).transpose(1, 2)
        assert (out - sdar.DenseRow(row).attend(0, q, k, v, 0.25)).abs().max() < 1e-5
    assert counter.frame_count == 2


# ---------------------------------------------------------- what a position depends on, and not


@torch.no_grad()
@pytest.mark.parametrize("attention", ["dense", "joint"])
def test_logits_depend_on_visible_tokens_only(tiny_folder, tmp_path, attention):
    """One layer, so that a token is seen directly or not at all; then all layers, transitively."""
    deep = sdar.load(str(tiny_folder))
    shallow = sdar.load(str(tiny(tmp_path, **TINY | {"num_hidden_layers": 1})))
    rng = random.Random(0)
    rollouts = [random_rollout(rng, 4, prompt, 2) for prompt in (6, 3)]
    row = one_row([replay(r, 4, weight=1.0, exact=True) for r in rollouts], 4)
    tags = list(zip(row.sequence.tolist(), row.block.tolist(), row.view.tolist(), strict=True))

    def reaches(q: int, kv: int) -> bool:
        """A view sees itself and the clean blocks before it; what those see is among them."""
        (qs, qb, qv), (s, b, v) = tags[q], tags[kv]
        return qs == s and ((v == 0 and b < qb) or v == qv)

    assert all(tags[q][2] > 0 for q in row.scored.tolist())
    for network in (shallow, deep):
        before = logits_of(network, row, attention)
        for kv in range(len(row)):
            changed = dataclasses.replace(row, ids=row.ids.clone())
            changed.ids[kv] = (changed.ids[kv] + 7) % WORDS
            moved = (logits_of(network, changed, attention) - before).abs().amax(-1)
            for q, by in zip(row.scored.tolist(), moved.tolist(), strict=True):
                if reaches(q, kv):
                    assert by > 1e-6, f"token {q} should see token {kv}"
                else:
                    assert by == 0, f"token {q} should not see token {kv}"


# -------------------------------------------- blocks of one token, and the network as such


def causal_twin(network) -> Qwen3ForCausalLM:
    """transformers' own Qwen3, causal, with the same weights."""
    fields = {k: v for k, v in network.config.to_dict().items() if k != "model_type"}
    config = Qwen3Config(**{k: v for k, v in fields.items() if k != "architectures"})
    config._attn_implementation = "eager"
    twin = Qwen3ForCausalLM(config)
    twin.load_state_dict(network.state_dict())
    return twin.eval()


@torch.no_grad()
def test_block_size_1_is_causal_qwen3_up_to_the_shift(tiny_model):
    twin, rng = causal_twin(tiny_model), random.Random(1)
    rollout = random_rollout(rng, 1, prompt=5, blocks=9)
    row = one_row([replay(rollout, 1, weight=1.0)], 1)
    mine = logits_of(tiny_model, row, "joint")
    ids = rollout.prompt_ids + rollout.response_ids
    for logits, position in zip(mine, row.positions[row.scored].tolist(), strict=True):
        theirs = twin(torch.tensor([ids[:position] + [MASK]])).logits[0, -1]
        assert (logits - theirs).abs().max() < 1e-4
    clean = logits_of(tiny_model, clean_row(ids, 1), "joint")
    assert (clean - twin(torch.tensor([ids])).logits[0]).abs().max() < 1e-4


def written_out(weights: dict, ids: list[int], config) -> torch.Tensor:
    """SDAR's forward over clean tokens, line by line in float64: logits [N, V]."""
    w = {k: v.double() for k, v in weights.items()}
    n, dim = len(ids), config.head_dim
    heads, groups = config.num_attention_heads, config.num_key_value_heads

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    angle = torch.arange(n).double()[:, None] * torch.tensor(
        [10000.0 ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.double
    )

    def rotate(x):  # [N, heads, D]: the first half of the features pairs with the second
        first, second = x[..., : dim // 2], x[..., dim // 2 :]
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    x = w["model.embed_tokens.weight"][torch.tensor(ids)]
    for i in range(config.num_hidden_layers):
        p = f"model.layers.{i}."
        h = norm(x, w[p + "input_layernorm.weight"])
        q, k, v = ((h @ w[f"{p}self_attn.{name}_proj.weight"].T).view(n, -1, dim) for name in "qkv")
        q = rotate(norm(q, w[p + "self_attn.q_norm.weight"]))
        k = rotate(norm(k, w[p + "self_attn.k_norm.weight"]))
        out = torch.zeros(n, heads, dim, dtype=torch.double)
        for head in range(heads):
            shared = head // (heads // groups)
            for t in range(n):
                end = (t // config.block_size + 1) * config.block_size  # the own block, whole
                score = (k[:end, shared] @ q[t, head] / dim**0.5).softmax(0)
                out[t, head] = score @ v[:end, shared]
        x = x + out.view(n, -1) @ w[p + "self_attn.o_proj.weight"].T
        h = norm(x, w[p + "post_attention_layernorm.weight"])
        gate = F.silu(h @ w[p + "mlp.gate_proj.weight"].T)
        x = x + (gate * (h @ w[p + "mlp.up_proj.weight"].T)) @ w[p + "mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("attention", ["dense", "joint"])
def test_clean_pass_against_a_forward_written_out(tiny_folder, tiny_model, attention):
    for module in tiny_model.modules():  # norms start at 1, which would hide a missing one
        if isinstance(module, Qwen3RMSNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    ids = [random.Random(2).randrange(WORDS) for _ in range(20)]
    theirs = written_out(tiny_model.state_dict(), ids, tiny_model.config)
    mine = logits_of(tiny_model, clean_row(ids, 4), attention)
    assert theirs.std() > 1
    assert (mine - theirs).abs().max() < 1e-4


# --------------------------------------------------------------------------------------- scoring


def oracle(logits: list[float], target: int, bound: float, how: Sampling) -> tuple[float, float]:
    """(log-probability, entropy) of one action by sorting, in plain Python."""
    scaled = [x / how.temperature for x in logits]
    total = sum(math.exp(x) for x in scaled)
    p = [math.exp(x) / total for x in scaled]
    ranked = sorted(range(len(p)), key=lambda v: -p[v])
    kept = ranked[: how.top_k] if how.top_k else ranked
    if how.top_p < 1:
        mass, within, nucleus = sum(p[v] for v in kept), 0.0, []
        for v in kept:  # a token stays while those before it have at most top_p
            if within <= how.top_p or not nucleus:
                nucleus.append(v)
            within += p[v] / mass
        kept = nucleus
    mass = sum(p[v] for v in kept)
    g = [p[v] / mass if v in set(kept) else 0.0 for v in range(len(p))]
    entropy = -sum(x * math.log(x) for x in g if x)
    held = sum(g[v] for v in range(len(p)) if p[v] < bound)
    action = held if target == HOLD else g[target]
    floor = math.exp(sdar.LOG_FLOOR)
    return math.log(max(action, floor)), entropy


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 5])
@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.3])
def test_score_logits_against_sorting(temperature, top_k, top_p):
    how = Sampling(temperature, top_k, top_p)
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(40, 30, generator=generator)
    targets = torch.randint(0, 30, (40,), generator=generator)
    targets[::3] = logits[::3].argmax(-1)
    targets[1::3] = HOLD
    bounds = torch.rand(40, generator=generator)
    scores = score_logits(logits, targets, bounds.log(), how)
    for m in range(40):
        logprob, entropy = oracle(logits[m].tolist(), int(targets[m]), float(bounds[m]), how)
        assert float(scores.logprobs[m]) == pytest.approx(logprob, abs=1e-4), f"action {m}"
        assert float(scores.entropy[m]) == pytest.approx(entropy, abs=1e-4), f"action {m}"


def test_reveals_and_holds_sum_to_one():
    """Every draw is either at least as probable as the bound (a reveal) or held."""
    logits = torch.randn(6, 20, generator=torch.Generator().manual_seed(1)) * 2
    bound = 0.1
    p = logits.softmax(-1)
    hold = score_logits(logits, torch.full((6,), HOLD), torch.full((6,), bound).log(), Sampling())
    above = torch.where(p >= bound, p, 0.0).sum(-1)
    assert torch.allclose(hold.logprobs.exp() + above, torch.ones(6), atol=1e-6)


@pytest.mark.parametrize("how", [Sampling(), Sampling(0.7, top_k=3), Sampling(top_p=0.5)])
def test_impossible_actions_get_the_floor_and_finite_gradients(how):
    """No draw is below the bound; a revealed token that the sampler now drops; huge logits."""
    logits = torch.tensor([[9.0, 1, 0, -1], [1e4, 0, 0, 0], [0.0, 0, 0, 0], [-3e4, 3e4, 0, 1]])
    logits.requires_grad_(True)
    targets = torch.tensor([HOLD, 3, HOLD, HOLD])
    bounds = torch.tensor([0.0, 0.0, 1e-9, float("inf")]).log()
    scores = score_logits(logits, targets, bounds, how)
    assert scores.logprobs[:3].tolist() == pytest.approx([sdar.LOG_FLOOR] * 3)
    assert scores.logprobs[3].item() == pytest.approx(0.0), "any draw was held"
    scores.logprobs.sum().backward()
    assert logits.grad.isfinite().all()
    assert not scores.entropy.requires_grad, "a metric"


def few_logits_at_once(monkeypatch, vocabulary: int, scored: int) -> None:
    """Chunks of at most `scored` positions, on whichever path."""
    monkeypatch.setattr(sdar, "LOGITS_KEPT", scored * vocabulary)
    monkeypatch.setattr(kernels, "SCORING_BYTES", 10 * scored * vocabulary)


@pytest.mark.parametrize(
    "how", [Sampling(), Sampling(0.8), Sampling(0.8, top_k=20, top_p=0.9)], ids=["", "tempered", "top"]
)
@pytest.mark.parametrize("tied", [False, True])
def test_chunked_scoring_changes_nothing(tmp_path, monkeypatch, how, tied):
    network = sdar.load(str(tiny(tmp_path, **TINY | {"tie_word_embeddings": tied})))
    rng = random.Random(4)
    views = [replay(random_rollout(rng, 4), 4, 1.0, exact=True) for _ in range(4)]
    row = one_row(views, 4)
    assert (row.targets == HOLD).any() and len(row.scored) > 11
    weights = torch.linspace(-1, 1, len(row.scored))
    whole = network.score(row, how)
    whole_gradient = gradient(network, (whole.logprobs * weights).sum())
    few_logits_at_once(monkeypatch, network.config.vocab_size, scored=5)
    chunked = network.score(row, how)
    assert (whole.logprobs - chunked.logprobs).abs().max() < 1e-5
    assert (whole.entropy - chunked.entropy).abs().max() < 1e-5
    assert relative(gradient(network, (chunked.logprobs * weights).sum()), whole_gradient) < 1e-5


def test_top_k_is_scored_in_chunks_too(tiny_model, monkeypatch):
    row = one_row([replay(random_rollout(random.Random(4), 4), 4, 1.0) for _ in range(4)], 4)
    at_once = []
    tiny_model.lm_head.register_forward_hook(lambda m, i, out: at_once.append(len(out)))
    few_logits_at_once(monkeypatch, tiny_model.config.vocab_size, scored=5)
    tiny_model.score(row, Sampling(top_k=3)).logprobs.sum().backward()
    assert max(at_once) <= 5 and sum(at_once) == 2 * len(row.scored), "again backward"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("holds", [False, True])
@pytest.mark.parametrize("at_once", [1, 4, 11])
def test_written_out_gradient_in_float64(monkeypatch, temperature, holds, at_once):
    """Against autograd through score_logits, and against finite differences; 11 actions in chunks."""
    generator = torch.Generator().manual_seed(at_once)
    hidden = torch.randn(11, 6, generator=generator, dtype=torch.double)
    head = 2 * torch.randn(19, 6, generator=generator, dtype=torch.double)
    targets = torch.randint(0, 19, (11,), generator=generator)
    bounds = (torch.rand(11, generator=generator) / 2).log()
    if holds:
        targets[::2] = HOLD
        bounds[2], bounds[4] = -math.inf, math.inf  # nothing could be held; any draw would have been
    few_logits_at_once(monkeypatch, 19, at_once)
    inputs = (hidden.requires_grad_(True), head.requires_grad_(True))

    def mine(hidden, head):
        return kernels.ScoreChunks.apply(hidden, head, targets, bounds, temperature, sdar.LOG_FLOOR)

    scores = score_logits(hidden @ head.T, targets, bounds, Sampling(temperature))
    logprobs, entropy = mine(*inputs)
    assert torch.allclose(logprobs, scores.logprobs, atol=1e-12)
    assert torch.allclose(entropy, scores.entropy, atol=1e-12) and not entropy.requires_grad
    weights = torch.randn(11, generator=generator, dtype=torch.double)
    found, wanted = (torch.autograd.grad((x * weights).sum(), inputs) for x in (logprobs, scores.logprobs))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, wanted, strict=True))
    assert torch.autograd.gradcheck(lambda *x: mine(*x)[0], inputs)


def test_a_frozen_head_gets_no_gradient(monkeypatch):
    few_logits_at_once(monkeypatch, 30, scored=5)
    hidden, head = torch.randn(20, 8, requires_grad=True), torch.randn(30, 8)
    logprobs, _ = kernels.ScoreChunks.apply(
        hidden, head, torch.arange(20), torch.zeros(20), 1.0, sdar.LOG_FLOOR
    )
    logprobs.sum().backward()
    assert hidden.grad.abs().sum() > 0 and head.grad is None


@pytest.mark.parametrize("holds", [False, True])
@pytest.mark.parametrize(("dtype", "hidden"), [(torch.bfloat16, 64), (torch.float32, 256)])
def test_memory_of_scoring_is_one_chunk(monkeypatch, dtype, hidden, holds):
    """At most 10 bytes per logit of a chunk, next to gradients of head and hidden states held once.

    That is SCORING_BYTES, however many positions are scored.
    """
    vocabulary, chunk = 4096, 100
    few_logits_at_once(monkeypatch, vocabulary, scored=chunk)
    problem = scoring.Problem(1000, vocabulary, hidden, dtype, "cpu")
    results = problem.hidden.nbytes + problem.head.nbytes
    targets = problem.some_held if holds else problem.targets
    peak = scoring.peak_bytes(lambda: problem.gradients(lambda: problem.model(targets)), "cpu")
    assert results < peak < results + 10 * chunk * vocabulary
    plain = scoring.peak_bytes(lambda: problem.gradients(lambda: problem.plain(targets)), "cpu")
    assert plain > 4 * peak, "all logits at once would break the bound"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("holds", [False, True])
def test_compiled_scoring_equals_eager(dtype, holds):
    """What CUDA runs, compiled for the CPU; the second size of a chunk must not be a special case."""
    for scored in (40, 24):
        problem = scoring.Problem(scored, 1000, 16, dtype, "cpu")
        logits = (problem.hidden @ problem.head.T).detach()
        bounds = torch.where(problem.some_held == HOLD, problem.bounds, -math.inf) if holds else None
        targets = problem.some_held if holds else problem.targets
        given = logits.clone()
        eager = kernels._score_chunk(logits.clone(), targets, bounds, 1.0, sdar.LOG_FLOOR)
        compiled = kernels._compiled(kernels._score_chunk)(given, targets, bounds, 1.0, sdar.LOG_FLOOR)
        for a, b in zip(eager, compiled, strict=True):
            assert torch.allclose(a, b, atol=2e-5)
        parts = (bounds, eager[0], eager[2:], problem.weights, 1.0)
        eager = kernels._score_chunk_gradient(logits.clone(), *parts)
        compiled = kernels._compiled(kernels._score_chunk_gradient)(given, *parts)
        assert torch.equal(given, logits), "compiled, nothing is written into what was given"
        assert torch.allclose(eager, compiled, atol=1e-5, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("holds", [False, True])
def test_scoring_is_compiled_twice_whatever_the_sizes(monkeypatch, holds):
    """Once for the first size of a chunk, once for every other: torch gives up after 8."""
    torch._dynamo.reset()
    counters = {}

    def compiled(function, _):
        counter = counters.setdefault(function, CompileCounterWithBackend("aot_eager"))
        return torch.compile(function, backend=counter)

    vocabulary, at_once = 50, 7
    few_logits_at_once(monkeypatch, vocabulary, at_once)
    for scored in (20, 36, 11, at_once + 1, 2 * at_once + 1, 3, at_once, 29, 50):
        problem = scoring.Problem(scored, vocabulary, 8, torch.float32, "cpu")
        targets = problem.some_held if holds else problem.targets
        wanted = problem.gradients(lambda p=problem, t=targets: p.plain(t))
        with monkeypatch.context() as on_cuda:
            on_cuda.setattr(kernels, "_fused", compiled)
            found = problem.gradients(lambda p=problem, t=targets: p.model(t))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))
    graphs = [counter.frame_count for counter in counters.values()]
    assert graphs == [2, 2], "forward and backward"


@pytest.mark.parametrize(("length", "chunks"), [(11, 1), (11, 4), (15, 2), (8, 8), (12, 5)])
def test_chunks_have_one_size(length, chunks):
    """Or differ by one; a last one of a single row would be one more case to compile."""
    slices = kernels._slices(length, chunks)
    assert [i for s in slices for i in range(length)[s]] == list(range(length))
    sizes = [s.stop - s.start for s in slices]
    assert len(sizes) == chunks and max(sizes) - min(sizes) <= 1


def test_score_is_score_logits_of_what_is_scored(tiny_model):
    rng, how = random.Random(5), Sampling(0.9, top_k=50)
    row = one_row([replay(random_rollout(rng, 4), 4, 1.0, exact=True) for _ in range(3)], 4)
    scores = tiny_model.score(row, how)
    plain = score_logits(logits_of(tiny_model, row), row.targets, row.bounds, how)
    assert (scores.logprobs - plain.logprobs).abs().max() < 1e-4
    assert scores.logprobs.dtype == torch.float32


# ------------------------------------------------------------------ compiled and checkpointed layers


def train_on(network, rows: list[Packed]) -> list[torch.Tensor]:
    """Gradients of a weighted sum of the log-probabilities, row by row."""
    gradients = []
    for row in rows:
        logprobs = network.score(row, Sampling()).logprobs
        gradients.append(gradient(network, (logprobs * torch.linspace(-1, 1, len(logprobs))).sum()))
    return gradients


@pytest.mark.parametrize("changes", [{}, MOE], ids=["", "moe"])
def test_checkpointing_trades_memory_and_changes_nothing(tmp_path, changes):
    """Bytes held after the forward pass: none > selective > full; the gradient is the same."""
    folder = str(tiny(tmp_path, **TINY | changes))
    rows = noised_rows([200])
    held, gradients = {}, {}
    for how in ("none", "selective", "full"):
        network = sdar.load(folder)
        names = network.state_dict().keys()
        kernels.checkpoint_layers(network, how)
        assert network.state_dict().keys() == names
        gradients[how] = train_on(network, rows)
        kept = []
        held[how] = scoring.peak_bytes(
            lambda n=network, k=kept: k.append(n.score(rows[0], Sampling())), "cpu"
        )
    assert all(relative(gradients[how][0], gradients["none"][0]) < 1e-6 for how in gradients)
    assert held["none"] > 1.3 * held["selective"] > 1.3 * held["full"]


def test_another_word_for_checkpointing_is_refused(tiny_model):
    with pytest.raises(InputError, match="expected none, selective or full, got some"):
        kernels.checkpoint_layers(tiny_model, "some")


@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_compiled_layers(tiny_folder, how):
    """All layers share one code, compiled for the first length and for any length; decoding is eager."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    eager, network = sdar.load(str(tiny_folder)), sdar.load(str(tiny_folder))
    kernels.checkpoint_layers(network, how)
    kernels.compile_layers(network, backend=counter)
    rows = noised_rows([60, 100, 84, 200])
    gradients = train_on(network, rows[:3])
    assert 1 <= counter.frame_count <= 3
    compiled = counter.frame_count
    gradients += train_on(network, rows[3:])
    ids, slots = torch.arange(12)[None], torch.arange(1)
    with torch.no_grad():
        logits = [
            n.decode(ids, torch.arange(12)[None], sdar.BlockCache(n, 1, 16, 4), slots)
            for n in (eager, network)
        ]
    assert torch.equal(*logits)
    assert counter.frame_count == compiled, "no recompilation after the third batch, none by decoding"
    for mine, theirs in zip(gradients, train_on(eager, rows), strict=True):
        assert relative(mine, theirs) < 1e-5


# ----------------------------------------------------------------------------------- load and save


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def edit_config(folder, drop=(), **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    for key in drop:
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, MOE], ids=["", "tied", "moe"])
def test_load_and_save_round_trip(tmp_path, changes):
    first = tiny(tmp_path / "first", **TINY | changes)
    network = sdar.load(str(first))
    save(network, tmp_path / "second", read_copied(first))
    before, after = tensors_of(first), tensors_of(tmp_path / "second")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert ("lm_head.weight" in before) == ("tie_word_embeddings" not in changes)
    for file in first.iterdir():
        if file.suffix in (".json", ".jinja"):
            assert (tmp_path / "second" / file.name).read_bytes() == file.read_bytes(), file.name
    again = sdar.load(str(tmp_path / "second"))
    row = one_row([replay(random_rollout(random.Random(6), 4), 4, 1.0)], 4)
    with torch.no_grad():
        scores = [m.score(row, Sampling()).logprobs for m in (network, again)]
    assert torch.equal(*scores) and scores[0].isfinite().all()


def test_save_over_the_folder_it_came_from(tmp_path):
    folder = tiny(tmp_path, **TINY)
    config = (folder / "config.json").read_bytes()
    network = sdar.load(str(folder))
    with torch.no_grad():
        network.lm_head.weight.mul_(2)
    save(network, folder, read_copied(folder))
    assert (folder / "config.json").read_bytes() == config
    assert torch.equal(sdar.load(str(folder)).lm_head.weight, network.lm_head.weight)


def test_a_folder_as_published_loads_without_remote_code(tmp_path, tiny_folder):
    folder = tiny(tmp_path, **TINY)
    edit_config(
        folder,
        drop=["block_size", "mask_token_id", "pad_token_id"],
        rope_scaling=None,
        max_window_layers=28,
        torch_dtype="bfloat16",
        auto_map={
            "AutoConfig": "configuration_sdar.SDARConfig",
            "AutoModel": "modeling_sdar.SDARModel",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
    )
    trap = "raise SystemExit('the published code was run')\n"
    for name in ("configuration_sdar.py", "modeling_sdar.py"):
        (folder / name).write_text(trap)
    network, twin = sdar.load(str(folder)), sdar.load(str(tiny_folder))
    assert network.dtype == torch.float32 and type(network) is sdar.SDARForCausalLM
    row = one_row([replay(random_rollout(random.Random(7), 4), 4, 1.0)], 4)
    with torch.no_grad():
        assert torch.equal(*(m.score(row, Sampling()).logprobs for m in (network, twin)))
    save(network, tmp_path / "out", read_copied(folder))
    assert (tmp_path / "out" / "modeling_sdar.py").read_text() == trap
    copied = (tmp_path / "out" / "config.json").read_bytes()
    assert copied == (folder / "config.json").read_bytes()


def test_moe_files_keep_one_tensor_per_expert(tmp_path):
    folder = tiny(tmp_path, **TINY | MOE)
    names = tensors_of(folder)
    for expert in range(4):
        for projection, shape in (("gate", (32, 64)), ("up", (32, 64)), ("down", (64, 32))):
            name = f"model.layers.0.mlp.experts.{expert}.{projection}_proj.weight"
            assert names[name].shape == shape, name
    assert names["model.layers.1.mlp.gate.weight"].shape == (4, 64)
    network = sdar.load(str(folder))
    assert type(network) is sdar.SDARMoeForCausalLM
    rollout = random_rollout(random.Random(8), 4, prompt=6, blocks=3)
    row = one_row([replay(rollout, 4, weight=1.0)], 4)
    mine = network.score(row, Sampling()).logprobs
    theirs, _ = layout.score_rounds(network, rollout, 4, MASK)
    at = row.positions[row.scored] - len(rollout.prompt_ids)
    assert (mine - theirs[at]).abs().max() < 1e-5
    assert gradient(network, mine.sum()).isfinite().all()


def test_sharded_weights_load(tmp_path):
    folder = tiny(tmp_path, **TINY)
    whole = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    names, index = sorted(whole), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({k: whole[k] for k in part}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
    )
    loaded = sdar.load(str(folder)).state_dict()
    assert loaded.keys() == whole.keys()
    assert all(torch.equal(loaded[k], whole[k]) for k in whole)


def rewrite(folder, change) -> None:
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


NORM = "model.layers.1.self_attn.q_norm.weight"
DAMAGE = {
    "missing": (lambda f: rewrite(f, lambda t: t.pop(NORM)), f"missing tensor {NORM}"),
    "unexpected": (
        lambda f: rewrite(f, lambda t: t.update({"extra.weight": torch.ones(2)})),
        "unexpected tensor extra.weight",
    ),
    "shape": (lambda f: rewrite(f, lambda t: t.update({NORM: torch.ones(3)})), NORM),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1000]),
        "cannot read the weights",
    ),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "cannot read the weights"),
    "none": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "type": (lambda f: edit_config(f, model_type="qwen3"), "model_type is qwen3, expected sdar"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_named(tmp_path, name):
    damage, message = DAMAGE[name]
    folder = tiny(tmp_path / "damaged", **TINY)
    damage(folder)
    with pytest.raises(InputError) as caught:
        sdar.load(str(folder))
    assert message in str(caught.value) and str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_folder(tmp_path):
    with pytest.raises(InputError, match="no such checkpoint folder"):
        sdar.load(str(tmp_path / "nothing"))


def test_the_tokenizer_travels_with_the_checkpoint(tmp_path, tiny_folder, tiny_model):
    save(tiny_model, tmp_path / "copy", read_copied(tiny_folder))
    tokenizer = load_tokenizer(str(tmp_path / "copy"))
    assert tokenizer.mask_token_id == MASK
    assert tokenizer.chat_template == CHAT_TEMPLATE
    chat = [{"role": "user", "content": "1+2?\u00e9"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\n1+2?\u00e9<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    names = tokenizer.convert_ids_to_tokens(stop_ids(tokenizer))
    assert sorted(names) == ["<|endoftext|>", "<|im_end|>"]
    assert AutoTokenizer.from_pretrained(tmp_path / "copy").get_vocab() == tokenizer.get_vocab()


def test_a_tokenizer_without_what_is_needed_is_refused(tmp_path):
    folder = tiny(tmp_path / "a", **TINY)
    for file in folder.glob("*.jinja"):
        file.unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="no chat template"):
        load_tokenizer(str(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="cannot read the tokenizer"):
        load_tokenizer(str(folder))
