"""Published checkpoints, by the forms of their config.json: they load as what they are, in their blocks.

None is downloaded. A form has the fields of the published file, and smaller sizes. Where the fields come
from: copies of config.json in public repositories on GitHub, named beside each form; what could not be found
is said beside the name.
"""

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_rows import write_task
from faults import works
from safetensors.torch import load_file, save_file

import model
import rollout
from masking import noise, pack
from model import Sampling, choose_block_size
from plumbing.checkpoint import CHAT_TEMPLATE, fill, load_tokenizer, on_meta, read_config, tiny
from plumbing.common import InputError
from plumbing.published import BLOCK_SIZES, assumed_block_size, hub_name

QWEN3 = {  # in all of them
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "head_dim": 128, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
DENSE = QWEN3 | {
    "architectures": ["SDARForCausalLM"], "model_type": "sdar",
    "auto_map": {
        "AutoConfig": "configuration_sdar.SDARConfig", "AutoModel": "modeling_sdar.SDARModel",
        "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    },
    "transformers_version": "4.52.4",
}  # fmt: skip
FLEX = {  # what 4B and 8B have beside that
    "attn_implementation": "flex_attention", "debug": False, "ep_size": 1, "micro_forward": False,
    "skip_checkpoint": False, "use_cache": False, "use_deepep": False,
}  # fmt: skip
IN_BLOCKS = {"block_size": 4, "mask_token_id": 151669}


def dense(hidden: int, intermediate: int, layers: int, heads: int, key_heads: int, **more) -> dict:
    shape = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    heads = {"num_attention_heads": heads, "num_key_value_heads": key_heads, "max_window_layers": layers}
    return DENSE | shape | heads | more


FORMS = {
    # Linn3a/DARE at c96b1e0, models/SDAR-1.7B-Chat/config.json
    "JetLM/SDAR-1.7B-Chat": dense(2048, 6144, 28, 16, 8, fuse_cross_entropy=False, use_cache=True),
    # yethegod/dllm_rl at ddf1b6f, models/SDAR-4B-Chat/config.json
    "JetLM/SDAR-4B-Chat": dense(2560, 9728, 36, 32, 8, fuse_cross_entropy=True, **FLEX),
    # Linn3a/DARE at c96b1e0, models/SDAR-8B-Chat/config.json
    "JetLM/SDAR-8B-Chat": dense(4096, 12288, 36, 32, 8, fuse_cross_entropy=False, **FLEX),
    # Xenearkr/DARE at fd704cf, models/SDAR-30B-A3B-Chat/config.json
    "JetLM/SDAR-30B-A3B-Chat": QWEN3 | {
        "architectures": ["SDARMoeForCausalLM"], "model_type": "sdar_moe",
        "auto_map": {
            "AutoConfig": "configuration_sdar_moe.SDARMoeConfig",
            "AutoModel": "modeling_sdar_moe.SDARMoeModel",
            "AutoModelForCausalLM": "modeling_sdar_moe.SDARMoeForCausalLM",
        },
        "decoder_sparse_step": 1, "hidden_size": 2048, "intermediate_size": 6144, "max_window_layers": 48,
        "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "num_key_value_heads": 4, "output_router_logits": False, "router_aux_loss_coef": 0.001,
        "transformers_version": "4.51.0", "use_cache": True,
    },
    # OpenMOSS/DiRL at 15cc89b, models/sdar/config.json, of its training code; the hub's was not seen
    "OpenMOSS-Team/DiRL-8B-Instruct": dense(
        4096, 12288, 36, 32, 8, fuse_cross_entropy=True, **FLEX, **IN_BLOCKS
    ),
}  # fmt: skip
# Trained from the checkpoint beside it; its own config.json was not found anywhere.
SAME_AS = {
    "Gen-Verse/TraDo-4B-Instruct": "JetLM/SDAR-4B-Chat",
    "Gen-Verse/TraDo-8B-Instruct": "JetLM/SDAR-8B-Chat",
    "Gen-Verse/TraDo-8B-Thinking": "JetLM/SDAR-8B-Chat",
    "JetLM/SDAR-30B-A3B-Sci": "JetLM/SDAR-30B-A3B-Chat",
    "lulululuyi/TDAR-8B-Thinking": "JetLM/SDAR-8B-Chat",  # the name: github LuLuLuyi/TDAR, README
}
# With blocks of b tokens; SDAR's README says that there are such, 8B-Chat-b16, -b32 and -b64 and
# 1.7B-Chat-b32, 30B-A3B-Chat-b32 are named in other repositories, the rest was not seen.
for size in ("1.7B", "4B", "8B", "30B-A3B"):
    for b in (8, 16, 32, 64):
        SAME_AS[f"JetLM/SDAR-{size}-Chat-b{b}"] = f"JetLM/SDAR-{size}-Chat"
NAMES = [*FORMS, *SAME_AS]
SHRUNK = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "max_window_layers": 2, "vocab_size": 264, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
    "bos_token_id": 256, "eos_token_id": 256, "mask_token_id": 259, "max_position_embeddings": 512,
}  # fmt: skip


def form_of(name: str) -> dict:
    return FORMS[SAME_AS.get(name, name)]


def shrunk(name: str, **changes) -> dict:
    """The fields of the form, heads in the same ratio."""
    form = form_of(name)
    ratio = form["num_attention_heads"] // form["num_key_value_heads"]
    small = {key: value for key, value in SHRUNK.items() if key in form}
    heads = {"num_attention_heads": 2 * ratio, "num_key_value_heads": 2}
    return form | small | heads | {"torch_dtype": "float32", "initializer_range": 0.3} | changes


def write(name: str, parent: Path, **changes) -> Path:
    """A folder NAME with random weights and exactly the config of a form; tokenizer as of 30B-A3B and 4B."""
    folder = tiny(parent / name.rpartition("/")[2], **shrunk(name, **changes))
    (folder / "config.json").write_text(json.dumps(shrunk(name, **changes), indent=2))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "mask_token": "<|MASK|>"}
    settings |= {"auto_map": {"AutoTokenizer": ["tokenization_qwen2.Qwen2Tokenizer", None]}}
    settings |= {"chat_template": CHAT_TEMPLATE, "tokenizer_class": "Qwen2Tokenizer"}
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("name", FORMS)
def test_each_form_loads_as_what_it_is(name, tmp_path):
    form, folder = form_of(name), write(name, tmp_path)
    network = model.load(folder)
    expected = model.SDARMoeForCausalLM if "num_experts" in form else model.SDARForCausalLM
    assert type(network) is expected and network.config.rope_parameters["rope_theta"] == 1e6
    tensors = load_file(folder / "model.safetensors")
    attention = network.model.layers[1].self_attn

    # QK norm, grouped queries without bias, an output embedding of its own, no window.
    assert tensors["model.layers.1.self_attn.q_norm.weight"].shape == (16,)
    assert attention.q_norm.weight.shape == attention.k_norm.weight.shape == (16,)
    ratio = form["num_attention_heads"] // form["num_key_value_heads"]
    assert attention.q_proj.weight.shape == (2 * ratio * 16, 64) and attention.q_proj.bias is None
    assert attention.k_proj.weight.shape == (2 * 16, 64)
    assert network.lm_head.weight is not network.model.embed_tokens.weight
    assert "lm_head.weight" in tensors and attention.sliding_window is None

    # A dense layer, or experts of which a token takes some.
    mlp = network.model.layers[1].mlp
    if "num_experts" in form:
        assert mlp.experts.gate_up_proj.shape == (4, 2 * 32, 64)
        assert mlp.gate.top_k == 2 and mlp.gate.norm_topk_prob is True
        assert "model.layers.1.mlp.experts.3.down_proj.weight" in tensors
    else:
        assert mlp.gate_proj.weight.shape == (96, 64)


@pytest.mark.parametrize("name", FORMS)
def test_built_without_memory_and_filled_it_is_the_same(name, tmp_path):
    """As ranks do it that shard the model."""
    folder = write(name, tmp_path)
    network, filled = model.load(folder), on_meta(folder)
    fill(filled, folder, "cpu")
    views = noise(list(range(24)), 8, 4, np.random.default_rng(0), views=2, complementary=True)
    (row,) = pack([views], 4, 259, 99)
    with torch.no_grad():
        ours, theirs = (m.score(row, Sampling()).logprobs for m in (network, filled))
    assert torch.equal(ours, theirs) and len(set(ours.tolist())) > 4


@pytest.mark.parametrize("name", FORMS)
def test_it_attends_as_qwen3_does_block_by_block(name, tmp_path):
    """Against transformers' own Qwen3 with the rule of blocks as a mask: nothing else is special."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = write(name, tmp_path)
    kinds = {"sdar": (Qwen3Config, Qwen3ForCausalLM), "sdar_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM)}
    config_class, network_class = kinds[form_of(name)["model_type"]]
    config = config_class.from_pretrained(folder)
    config.model_type = config_class.model_type
    theirs = network_class.from_pretrained(folder, config=config, attn_implementation="eager")
    ours, ids, block = model.load(folder), torch.arange(3, 27), torch.arange(24) // 4
    hidden = torch.where(block[:, None] >= block[None, :], 0.0, -torch.inf)
    cache = model.BlockCache(ours, 1, 24, 4)
    with torch.no_grad():
        expected = theirs(ids[None], attention_mask=hidden[None, None]).logits
        found = ours.decode(ids[None], torch.arange(24)[None], cache, torch.tensor([0]))
    assert torch.allclose(found, expected, atol=1e-4) and expected.std() > 0.1


@pytest.mark.parametrize("name", FORMS)
def test_its_tokenizer_needs_no_code_of_the_folder(name, tmp_path):
    """Its file names a class in a Python file; the class of that name in transformers is taken."""
    tokenizer = load_tokenizer(write(name, tmp_path))
    assert tokenizer.mask_token_id == 259 and tokenizer.pad_token == "<|endoftext|>"
    assert "<|im_end|>" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1?"}], tokenize=False
    )


def odd_names(folder: Path) -> None:
    """Weights under the names of SDAR-30B-A3B-Chat's index, Xenearkr/DARE at fd704cf; and a file beside."""
    tensors, names = load_file(folder / "model.safetensors"), {}
    for name in tensors:
        layer = name.split(".")[2] if ".layers." in name else ""
        names[name] = f"layer-{layer}-ep-0-of-1.safetensors" if layer else "others.safetensors"
    for file in set(names.values()):
        part = {name: tensors[name] for name in tensors if names[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["JetLM/SDAR-8B-Chat", "JetLM/SDAR-30B-A3B-Chat"])
def test_weights_are_found_by_the_index(name, tmp_path):
    plain = write(name, tmp_path)
    odd = Path(shutil.copytree(plain, tmp_path / "odd"))
    odd_names(odd)
    one = on_meta(plain)
    fill(one, plain, "cpu")
    for other in (model.load(odd), on_meta(odd)):
        if other.model.embed_tokens.weight.is_meta:
            fill(other, odd, "cpu")
        for (a, expected), (b, found) in zip(one.named_parameters(), other.named_parameters(), strict=True):
            assert a == b and torch.equal(expected, found)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_named(content, tmp_path):
    folder = write("JetLM/SDAR-8B-Chat", tmp_path)
    odd_names(folder)
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match="model.safetensors.index.json: not an index"):
        on_meta(folder)


def test_an_index_that_points_out_of_the_folder(tmp_path):
    folder = write("JetLM/SDAR-8B-Chat", tmp_path)
    odd_names(folder)
    index = (folder / "model.safetensors.index.json").read_text().replace("others", "../others")
    (folder / "model.safetensors.index.json").write_text(index)
    (folder / "others.safetensors").rename(tmp_path / "others.safetensors")
    with pytest.raises(InputError, match=f"{folder}/others.safetensors: cannot read it"):
        on_meta(folder)


# --------------------------------------------------------------------------------- block size


def expected_size(name: str) -> int:
    _, _, b = name.rpartition("-b")
    return 16 if "TDAR" in name else int(b) if b.isdigit() else 4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["{}", "models--{owner}--{}/snapshots/0123abc"], ids=["folder", "cache"])
def test_the_block_size_of_every_published_name(name, place, tmp_path):
    owner, _, short = name.partition("/")
    folder = tmp_path / place.format(short, owner=owner)
    folder.mkdir(parents=True)
    assert assumed_block_size(folder)[0] == expected_size(name)
    assert hub_name(folder) == short.lower()
    if "block_size" in form_of(name):
        assert form_of(name)["block_size"] == expected_size(name)


def test_the_table_has_every_published_name_without_a_size_in_it():
    plain = {name.partition("/")[2].lower() for name in NAMES if not name.rpartition("-b")[2].isdigit()}
    assert plain == BLOCK_SIZES.keys()


def told_by(call) -> tuple:
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        result = call()
    return result, stderr.getvalue()


@pytest.mark.parametrize(
    ("name", "size"),
    [("SDAR-8B-Chat", 4), ("SDAR-8B-Chat-b32", 32), ("TDAR-8B-Thinking", 16), ("my-own-model", 4)],
)
def test_a_block_size_that_is_assumed_is_said_in_one_line(name, size, tmp_path):
    folder = tiny(tmp_path / name, **shrunk("JetLM/SDAR-8B-Chat", block_size=None))
    for config in (model.load(folder).config, read_config(folder)):
        found, line = told_by(lambda config=config: choose_block_size(0, config))
        assert found == size and line.count("\n") == 1
        assert f"{folder}: no block_size in config.json, blocks of {size} tokens" in line
        assert told_by(lambda config=config: choose_block_size(8, config)) == (8, "")


@pytest.mark.parametrize("name", ["LightningRL-8B-b32-GSM8K", "mine_b16", "SDAR-8B-Chat-b7-b64"])
def test_a_name_that_only_suggests_a_block_size_is_asked_about(name, tmp_path):
    """The first is named in a public script as a folder of SJTU-DENG-Lab; its hub page was not seen."""
    folder = tiny(tmp_path / name, **shrunk("JetLM/SDAR-8B-Chat", block_size=None))
    (size,) = [part for part in ("32", "16", "64") if f"b{part}" in name]
    config = read_config(folder)
    with pytest.raises(InputError, match=rf"config key block_size: .*{name}.* block_size={size}$"):
        choose_block_size(0, config)
    assert choose_block_size(4, config) == 4


@pytest.mark.parametrize("name", ["SDAR-1.7B", "run-2b", "ab16", "b32x", "web-b4k", "x-b100", "-b32/latest"])
def test_names_that_suggest_nothing(name):
    assert assumed_block_size(f"/somewhere/{name}")[0] == 4


def test_what_config_json_says_counts_more_than_any_name(tmp_path):
    folder = tiny(tmp_path / "SDAR-8B-Chat-b32", **shrunk("JetLM/SDAR-8B-Chat", block_size=8))
    assert told_by(lambda: choose_block_size(0, read_config(folder))) == (8, "")
    with pytest.raises(InputError, match="block_size: 32, but the checkpoint has 8"):
        choose_block_size(32, read_config(folder))


@pytest.mark.parametrize(("more", "size"), [([], 32), (["block_size=8"], 8)])
def test_what_is_trained_knows_its_block_size(more, size, tmp_path):
    """config.json of the checkpoint has it, beside all that the original's has; the next stage finds it."""
    base = write("JetLM/SDAR-1.7B-Chat-b32", tmp_path)
    write_task(tmp_path)
    argv = [f"data={tmp_path}/sft.jsonl", f"model={base}", f"out={tmp_path}/run", "steps=1", "batch_size=2"]
    works("sft", [*argv, "max_tokens=256", *more])
    original = json.loads((base / "config.json").read_text())
    config = json.loads((tmp_path / "run/latest/config.json").read_text())
    assert "block_size" not in original and config == original | {"block_size": size}
    assert told_by(lambda: choose_block_size(0, read_config(tmp_path / "run/latest"))) == (size, "")
    works("sft", [*argv, "max_tokens=256", *more, "steps=2", "resume=true"])
    resumed = (tmp_path / "run/checkpoints/step-000002/config.json").read_bytes()
    assert resumed == (tmp_path / "run/checkpoints/step-000001/config.json").read_bytes()


def test_an_engine_decodes_in_its_blocks(tmp_path):
    folder = write("JetLM/SDAR-30B-A3B-Chat-b16", tmp_path)
    network, tokenizer = model.load(folder), load_tokenizer(folder)
    size, _ = told_by(lambda: choose_block_size(0, network.config))
    engine = rollout.TorchEngine(network, size, tokenizer.mask_token_id, [256])
    (response,) = engine.generate([[1, 2, 3]], [0], rollout.Decoding(top_k=1, max_tokens=29))
    assert (3 + len(response.response_ids)) % 16 == 0
