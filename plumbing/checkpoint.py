"""Checkpoints: Hugging Face folders, read and written by slices, with their tokenizers.

Weights of a model that no single rank could hold: `on_meta` builds it without memory, `ranks.shard` cuts
it up, `fill` has every rank read its own slices of the files; `save` has the ranks write different files.
No `trust_remote_code`, no pickle. The classes of the model types below are registered with transformers
by model.py, from where `load` and the rest are called.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from plumbing.card import BASE_CARD, OURS
from plumbing.common import InputError, check_model, collecting, first_line, writing
from plumbing.lora import base_parameters, delta_weight
from plumbing.model_config import MODEL_TYPES, read_config_json

ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before torch 2.13
ROLES = ("system", "developer", "user", "assistant", "tool")

# --------------------------------------------------------------------------------- reading


def find_folder(name: str | Path) -> Path:
    """The local folder of a checkpoint: a path, or a Hugging Face model id (fetched once)."""
    name = str(name)
    check_model(name)
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.py", "README.md", "LICENSE*", "NOTICE*"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the hub raises many kinds; for the user they are one
        reason = str(error).splitlines()[0]
        raise InputError(f"{name}: neither a folder nor a model of the hub ({reason})") from error


def load(name: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.nn.Module:
    """An SDAR model from a checkpoint folder or a hub id.

    Raises:
        InputError: no folder, no config, not an SDAR model, missing or damaged weights.
    """
    folder = find_folder(name)
    config = read_config(folder)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="sdar",
            trust_remote_code=False,  # if it is not said, transformers asks on the terminal
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    except Exception as error:  # a truncated file, a wrong shape: safetensors and torch differ
        raise InputError(f"{folder}: cannot read the weights ({first_line(error)})") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            name = min(k if isinstance(k, str) else k[0] for k in report[problem])
            raise InputError(f"{folder}: {problem.removesuffix('_keys')} tensor {name}")
    for name, parameter in model.named_parameters():
        check_finite(name, parameter, folder)
    return model.to(device)


def read_config(folder: Path) -> Any:
    """The transformers config of a checkpoint folder with weights.

    Raises:
        InputError: no config or a damaged one, not an SDAR model, no weights.
    """
    model_type = read_config_json(folder)["model_type"]
    if model_type not in MODEL_TYPES:
        raise InputError(f"{folder}/config.json: model_type is {model_type}, expected sdar")
    config = _transformers_config(folder)
    if not list(folder.glob("*.safetensors")):
        raise InputError(f"{folder}: no weights, expected model.safetensors")
    return config


def _transformers_config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # its checks raise many kinds
        raise InputError(f"{folder}/config.json: not a model config ({first_line(error)})") from error


def check_finite(name: str, tensor: torch.Tensor, folder: Path) -> None:
    """Refuse a weight with nan or infinity in it, read from a checkpoint's folder or on its way there.

    Raises:
        InputError: naming folder and tensor.
    """
    if not tensor.isfinite().all():
        raise InputError(f"{folder}: tensor {name} has values that are nan or infinite")


class TensorFiles:
    """Tensors in the files FOLDER/STEM*.safetensors, read by slices along their first dimension.

    An index FOLDER/STEM.safetensors.index.json may give the files other names, as SDAR-30B-A3B's does.
    Opening them reads their headers only. A file may hold a slice of a tensor; its metadata then has
    `first_rows`, a JSON object of where the slice of each tensor begins.

    Raises:
        InputError: a file that cannot be read, a tensor or a slice of it that is in none of them.
    """

    def __init__(self, folder: Path, stem: str):
        self.parts: dict[str, list[tuple[int, object]]] = {}  # of each tensor: where it begins, slice
        self.where = folder / f"{stem}.safetensors"
        for file in tensor_files(folder, stem):
            try:
                opened = safe_open(file, "pt")
                first = json.loads((opened.metadata() or {}).get("first_rows", "{}"))
                for name in opened.keys():  # noqa: SIM118, it is no mapping
                    self.parts.setdefault(name, []).append((first.get(name, 0), opened.get_slice(name)))
            except (OSError, SafetensorError, ValueError) as error:
                raise InputError(f"{file}: cannot read it ({first_line(error)})") from error

    def shape(self, name: str) -> list[int]:
        """Of the whole tensor."""
        sizes = [[first + part.get_shape()[0], *part.get_shape()[1:]] for first, part in self.parts[name]]
        return max(sizes)

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """[stop - start, ...] of the tensor; it may be memory of the mapped file, so copy it."""
        found = []
        for first, part in sorted(self.parts.get(name, []), key=lambda item: item[0]):
            end = min(stop, first + part.get_shape()[0])
            if first <= start < end:
                found.append(part[start - first : end - first])
                start = end
        if start < stop:
            raise InputError(f"{self.where}: no slice {start} to {stop} of tensor {name}")
        return torch.cat(found) if len(found) > 1 else found[0]


def tensor_files(folder: Path, stem: str) -> list[Path]:
    """FOLDER/STEM*.safetensors, or what the index beside them names in their place.

    Raises:
        InputError: an index that is none.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if (folder / f"{stem}.safetensors").is_file() or not index.is_file():
        return sorted(folder.glob(f"{stem}*.safetensors"))
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(folder / Path(name).name for name in names)  # never outside of the folder
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: not an index of weights ({first_line(error)})") from error


def own_slice(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(what this rank holds of a tensor that fully_shard cut along its first dimension, where it begins)."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    mesh = tensor.device_mesh  # as torch.chunk does: equal parts, the last ones shorter or empty
    per_rank = -(-len(tensor) // mesh.size())
    return tensor.to_local(), min(mesh.get_local_rank() * per_rank, len(tensor))


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor made whole from its shards (a collective call), or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gather_into(place: torch.Tensor, tensor: torch.Tensor) -> None:
    """Copy a tensor into `place`, in that dtype; of a sharded one the slices of all ranks, a collective call.

    Slices of equal size, which is the rule, arrive where they belong: nothing but this rank's own slice is
    copied on the way. Others are gathered beside `place` first.
    """
    if not isinstance(tensor, DTensor):
        place.copy_(tensor)
    elif tensor.device_mesh.size() == 1:
        place.copy_(tensor.to_local())
    elif len(tensor) % tensor.device_mesh.size():
        place.copy_(tensor.to(place.dtype).full_tensor())
    else:
        own = tensor.to_local().to(place.device, place.dtype).contiguous()
        ALL_GATHER(place, own, group=tensor.device_mesh.get_group())


def as_published(name: str, tensor: torch.Tensor, first: int = 0) -> Iterator[tuple[str, torch.Tensor, int]]:
    """A slice of a parameter as (name, view, where it begins) of the tensors that a checkpoint has for it.

    They are the same, except that transformers fuses what published files keep one by one: experts are
    [E, 2I, H] (gate above up) and [E, H, I] here, gate_proj, up_proj and down_proj of each there.

    Args:
        first: where the slice begins, along the first dimension.
    """
    module, fused = name.rsplit(".", 1)
    if not module.endswith(".experts"):
        yield name, tensor, first
        return
    projections = ("gate_proj", "up_proj") if fused == "gate_up_proj" else (fused,)
    for number, expert in enumerate(tensor, start=first):
        for projection, view in zip(projections, expert.chunk(len(projections)), strict=True):
            yield f"{module}.{number}.{projection}.weight", view, 0


def on_meta(name: str | Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The model of a checkpoint without its weights and without memory for them; then shard, `fill`.

    Raises:
        InputError: as `load`, all problems with names and shapes of tensors included.
    """
    folder = find_folder(name)
    config = read_config(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdar", trust_remote_code=False
        )
    model.tie_weights()
    files = TensorFiles(folder, "model")
    wanted = {}
    for parameter_name, parameter in model.named_parameters():
        wanted |= {n: list(view.shape) for n, view, _ in as_published(parameter_name, parameter)}
    tied = {n for n, _ in model.named_parameters(remove_duplicate=False)} - wanted.keys()
    if missing := wanted.keys() - files.parts.keys():
        raise InputError(f"{folder}: missing tensor {min(missing)}")
    if unexpected := files.parts.keys() - wanted.keys() - tied:
        raise InputError(f"{folder}: unexpected tensor {min(unexpected)}")
    if mismatched := [n for n, shape in wanted.items() if files.shape(n) != shape]:
        raise InputError(f"{folder}: mismatched tensor {min(mismatched)}")
    return model


@torch.no_grad()
def fill(model: torch.nn.Module, name: str | Path, device: torch.device | str, weights_on: str = "") -> None:
    """Give a model that was built `on_meta` its memory and its weights, of which a rank reads its own slices.

    Args:
        device: where it computes.
        weights_on: where the weights wait if not there (CPU offload).
    """
    model.to_empty(device=weights_on or device)
    model.tie_weights()
    rotary = model.model.rotary_emb  # the only one with buffers, which no file has
    model.model.rotary_emb = type(rotary)(model.config).to(device)
    folder = find_folder(name)
    files = TensorFiles(folder, "model")
    for parameter_name, parameter in model.named_parameters():
        for published, view, first in as_published(parameter_name, *own_slice(parameter)):
            if len(view):
                view.copy_(files.slice(published, first, first + len(view)))
                check_finite(published, view, folder)


# ------------------------------------------------------------------------------ tokenizers


def is_block_diffusion(folder: Path) -> bool:
    """Whether a checkpoint is an SDAR model; if not, it is an autoregressive baseline for LMDeploy."""
    return read_config_json(folder)["model_type"] in MODEL_TYPES


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint, checked for what its model needs.

    Raises:
        InputError: no tokenizer, or one without the special tokens or a chat template; a token that the
            model does not know.
    """
    folder = find_folder(name)
    config = read_config_json(folder)
    diffusion = config["model_type"] in MODEL_TYPES
    if diffusion:  # else errors of the config would look like the tokenizer's
        _transformers_config(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        vocabulary = tokenizer.get_vocab()
    except Exception as error:
        reason = first_line(error)
        if "trust_remote_code" in str(error):  # transformers advises to allow it
            reason = "it is defined by code in that folder, which is never run"
        raise InputError(f"{folder}: cannot read the tokenizer ({reason})") from error

    # Special tokens: the end of a turn, and what only block diffusion needs.
    if tokenizer.mask_token_id is None:
        tokenizer.mask_token = "<|MASK|>" if "<|MASK|>" in vocabulary else None
    needed = {"eos": "<|im_end|>"}
    if diffusion:
        needed |= {"mask": "<|MASK|>", "pad": "<|endoftext|>"}
    for kind, expected in needed.items():
        if getattr(tokenizer, f"{kind}_token_id") is None:
            raise InputError(f"{folder}: the tokenizer has no {kind} token, expected one such as {expected}")
        token = getattr(tokenizer, f"{kind}_token")
        if _is_made_up(token, folder):
            raise InputError(f"{folder}: the {kind} token {token} is not in the tokenizer's vocabulary")

    # Every token has a row in the model's embedding.
    size = config.get("vocab_size")
    last = max(vocabulary, key=vocabulary.get)
    if isinstance(size, int) and vocabulary[last] >= size:
        raise InputError(
            f"{folder}: the tokenizer's token {last!r} is number {vocabulary[last]}, and vocab_size in "
            f"config.json is {size}"
        )
    _check_template(tokenizer, folder)
    return tokenizer


def _is_made_up(token: str, folder: Path) -> bool:
    """Whether a special token is none of tokenizer.json: transformers then adds it behind the last one."""
    if not (folder / "tokenizer.json").is_file():
        return False
    text = ""
    for name in ("tokenizer.json", "added_tokens.json"):
        if (folder / name).is_file():
            text += (folder / name).read_text(encoding="utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    text += json.dumps(settings.get("added_tokens_decoder", {}))
    return json.dumps(token) not in text and json.dumps(token, ensure_ascii=False) not in text


def _check_template(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Refuse a chat template that is missing, wrong, or leaves the question out."""
    if not tokenizer.chat_template:
        raise InputError(f"{folder}: the tokenizer has no chat template")
    turn, text = "3+8?", ""
    try:
        chat = [{"role": "user", "content": turn}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # whatever the template's language raises
        raise InputError(f"{folder}: the chat template fails ({first_line(error)})") from error
    if turn not in text:
        raise InputError(f"{folder}: the chat template leaves out what the user says")


def stop_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Tokens that end a response: the end of the turn and the end of the text."""
    names = [tokenizer.eos_token, "<|im_end|>", "<|endoftext|>"]
    vocabulary = tokenizer.get_vocab()
    return sorted({vocabulary[n] for n in names if n in vocabulary})


def encode_prompt(
    tokenizer: PreTrainedTokenizerFast, user_turn: str, history: Iterable[dict[str, str]] = ()
) -> list[int]:
    """Token ids of a chat that ends with a turn of the user, ready for the assistant's.

    Args:
        history: the turns before, each with role and content.

    Raises:
        InputError: the chat template refuses a chat with a history.
    """
    chat = [*history, {"role": "user", "content": user_turn}]
    try:
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    except (
        Exception
    ) as error:  # whatever the template's language raises; one turn `_check_template` has tried
        raise InputError(f"the chat template refuses a chat of {len(chat)} turns") from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_and_response(
    where: str, record: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> tuple[str, str]:
    """The texts of a record, chat template applied.

    Raises:
        InputError: neither of the two formats, or an empty text; naming `where`.
    """
    turns, prompt, response = record.get("messages"), record.get("prompt"), record.get("response")
    if isinstance(turns, list) and len(turns) > 1 and all(isinstance(t, dict) for t in turns):
        texts = all(isinstance(t.get("content"), str) for t in turns)
        if texts and turns[-1].get("role") == "assistant":
            if problem := _problem_of_turns(turns):
                raise InputError(f"{where}: {problem}")
            response = turns[-1]["content"]
            try:
                prompt = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, tokenize=False)
            except Exception as error:  # whatever the template's language raises
                raise InputError(f"{where}: the chat template refuses `messages`") from error
    if not isinstance(prompt, str) or not isinstance(response, str):
        raise InputError(
            f"{where}: expected `messages` that end with the assistant's, or `prompt` and `response`"
        )
    if not prompt:
        raise InputError(f"{where}: an empty prompt")
    if not response.strip():
        raise InputError(f"{where}: an empty response")
    return prompt, response


def _problem_of_turns(turns: list[dict[str, Any]]) -> str:
    """What a chat has that templates drop without a word, or lacks; empty: nothing."""
    roles = [turn.get("role") for turn in turns]
    for role in roles:
        if role not in ROLES:
            return f"the role {role!r} in `messages`, expected one of {', '.join(ROLES)}"
    if "user" not in roles:
        return "no turn of the user in `messages`"
    for turn in turns:
        if lost := [name for name in ("tool_calls", "function_call") if turn.get(name)]:
            return f"`{lost[0]}` in `messages`, expected texts only"
    return ""


# --------------------------------------------------------------------------------- writing


def named_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of what an engine computes with, one by one, for `gather_into`: sharded as they are.

    The product of a tensor's adapter is added.
    """
    for name, parameter in base_parameters(model):
        yield name, _with_adapter(model, name, parameter.detach())


def check_weights(
    tensors: Iterable[tuple[str, torch.Tensor]], shapes: dict[str, list[int]], tied: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a weight update as they come, each checked; tied ones are left out.

    Args:
        shapes: of everything that has to come, by name.
        tied: lm_head.weight is the embedding; some checkpoints hold it twice all the same.

    Raises:
        ValueError: a tensor is unknown, repeated or of another shape; at the end: one is missing.
    """
    expected = dict(shapes)
    if tied:
        expected.pop("lm_head.weight", None)
    for name, tensor in tensors:
        if tied and name == "lm_head.weight":
            continue
        if name not in expected:
            raise ValueError(f"weight update: unknown or repeated tensor {name}")
        if expected.pop(name) != list(tensor.shape):
            raise ValueError(f"weight update: {name} has shape {tuple(tensor.shape)}")
        yield name, tensor
    if expected:
        raise ValueError(f"weight update: missing tensor {min(expected)}")


def _with_adapter(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    delta = delta_weight(model, name)
    return tensor if delta is None else tensor + delta.to(tensor.dtype)


def write_tensors(file: Path, tensors: dict[str, torch.Tensor], key: str, value: str) -> None:
    """A safetensors file with one entry of metadata (of several, the order would be by chance).

    It is on the disk when this returns.
    """
    with writing(file):
        save_file(tensors, file, {key: value})
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def read_copied(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint that the next one takes over byte for byte: all except weights and state.

    That is config.json, tokenizer, chat template, published modelling code; so no version of transformers
    rewrites them. Licences too; and its card, under another name, unless it is one of plumbing/card.py.
    """
    kept, ours = (".json", ".txt", ".jinja", ".py"), ("state.json",)
    licence = re.compile(r"(LICEN[SC]E|NOTICE|COPYING)\b.*|" + re.escape(BASE_CARD), re.IGNORECASE)
    wanted = [f for f in folder.iterdir() if f.suffix in kept or licence.fullmatch(f.name)]
    wanted = [f for f in wanted if "safetensors" not in f.name]
    files = [f for f in wanted if f.is_file() and f.name not in ours]  # no folders, no links to nowhere
    copied = {file.name: file.read_bytes() for file in files}
    card = (folder / "README.md").read_bytes() if (folder / "README.md").is_file() else b""
    return copied | ({BASE_CARD: card} if card and OURS.encode() not in card else {})


def cut_into_files(
    model: torch.nn.Module, file_bytes: int
) -> tuple[list[list[tuple[str, torch.Tensor]]], list[str]]:
    """The (name, parameter) pairs of each file of about `file_bytes`, and the names of the files."""
    parts, used = [], file_bytes
    for name, parameter in base_parameters(model):
        if used + parameter.nbytes > file_bytes:
            parts.append([])
            used = 0
        parts[-1].append((name, parameter))
        used += parameter.nbytes
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    return parts, names if len(parts) > 1 else ["model.safetensors"]


def save(
    model: torch.nn.Module,
    folder: Path,
    copied: dict[str, bytes],
    rank: int = 0,
    ranks: int = 1,
    file_bytes: int = 4 * 2**30,
) -> list[str]:
    """Write a Hugging Face folder; call on every rank.

    The weights go to files of about `file_bytes`, which the ranks write at the same time, `ranks` of them
    in a round: no rank holds more than one at once.

    Args:
        copied: further files, as `read_copied` has them: with them it loads wherever their checkpoint does.

    Returns:
        Which files could not be written on this rank, and why; the call goes on all the same, since
        gathering the weights takes every rank.

    Raises:
        InputError: a weight is nan or infinite, on every rank alike.
    """
    # Round by round: all ranks gather every tensor, each keeps and writes those of its own file.
    folder.mkdir(parents=True, exist_ok=True)
    parts, names = cut_into_files(model, file_bytes)
    weight_map: dict[str, str] = {}
    problems: list[str] = []
    for start in range(0, len(parts), ranks):
        mine: dict[str, torch.Tensor] = {}
        for number, part in enumerate(parts[start : start + ranks]):
            for name, parameter in part:
                tensor = _with_adapter(model, name, gathered(parameter.detach()))
                check_finite(name, tensor, folder)
                for published, view, _ in as_published(name, tensor):
                    weight_map[published] = names[start + number]
                    if number == rank:
                        mine[published] = view.to("cpu", copy=True).contiguous()
        with collecting(problems):
            if mine and not problems:
                write_tensors(folder / names[start + rank], mine, "format", "pt")
    if rank:
        return problems

    # The index of several files, and the copies.
    contents = dict(copied)
    if len(parts) > 1:
        total = {"total_size": sum(p.nbytes for p in model.parameters())}
        index = json.dumps({"metadata": total, "weight_map": weight_map}, indent=2, sort_keys=True)
        contents["model.safetensors.index.json"] = (index + "\n").encode()
    with collecting(problems):
        for name, content in contents.items():
            with writing(folder / name):
                (folder / name).write_bytes(content)
    return problems


# ---------------------------------------------------------------------------- a tiny model


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, the special tokens of SDAR's tokenizer and the names of the roles: 263 tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>"])
    core.add_tokens([AddedToken(name, normalized=False) for name in ("system", "user", "assistant")])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        mask_token="<|MASK|>",
        chat_template=CHAT_TEMPLATE,
    )


def tiny(folder: str | Path, seed: int = 0, **changes) -> Path:
    """Write a small random SDAR checkpoint (0.8 M parameters) with a byte-level tokenizer.

    Args:
        changes: fields of config.json to set otherwise, e.g. hidden_size=64 or block_size=8.
    """
    # The tokenizer.
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"  # the class name that transformers 4 knows as well
    known = settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast")
    settings.write_text(known)

    # The config, with the keys of published ones.
    config = {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "block_size": 4,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "mask_token_id": tokenizer.mask_token_id,
        "fuse_cross_entropy": True,  # as published: whether that code fuses it in training; it always asks
        "hidden_act": "silu",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "initializer_range": 0.05,
        "max_position_embeddings": 4096,
        "max_window_layers": 4,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": 264,
    } | changes
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    # The weights.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)
    if problems := save(model, folder, read_copied(folder)):
        raise InputError(problems[0])
    return folder
