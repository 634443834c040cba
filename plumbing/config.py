"""Configs: flat dataclasses whose fields say what they mean, and the command line that sets them.

A field is declared once, with its default, its meaning and its bounds:

    lr: float = setting(1e-5, "peak learning rate", above=0)

`--help` prints the meanings, docs/config.md is made of them, and `load_config` checks the bounds. Nothing
here imports torch: a misspelt key is answered at once.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import operator
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from plumbing.common import InputError, check_model, checkpoints, end_on_signals, fail

Config = TypeVar("Config")
LARGEST = 2**63 - 1  # of all numbers in a config, and as far below 0
BOUNDS = {
    "at_least": (operator.ge, "at least"),
    "above": (operator.gt, "more than"),
    "at_most": (operator.le, "at most"),
    "below": (operator.lt, "less than"),
}
Rule = Literal["dynamic", "static", "sequential"]  # how positions are chosen: rollout.reveal
EngineName = Literal["auto", "lmdeploy", "torch"]


def setting(
    default: Any,
    meaning: str,
    *,
    heading: str = "",
    at_least: float | None = 0,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    holds: str = "",
    may_change: bool = False,
) -> Any:
    """A field of a config.

    Args:
        heading: `--help` begins a group of fields with this one.
        at_least, above, at_most, below: bounds of a number, or of every number of a list; None: none.
        holds: what a text has to contain.
        may_change: another value does not change what a run computes, so it is no other run when resumed.
    """
    metadata = {"meaning": meaning, "heading": heading, "holds": holds, "may_change": may_change}
    metadata |= {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# ----------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """Reports a bad option in one line, without the usage text."""

    def error(self, message: str):
        raise InputError(message)


def folder_name(text: str) -> Path:
    """A path of the command line; an empty one, often a shell variable that is not set, is none."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError("an empty name")
    return Path(text)


def picture_name(text: str) -> str:
    """A file of the command line that matplotlib is to write."""
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a name that ends with .png")
    return text


def readable(text: str) -> str:
    """A text of the command line that a tokenizer can read."""
    if not text.strip() or text != text.encode(errors="replace").decode():
        raise argparse.ArgumentTypeError("expected a text in UTF-8")
    return text


def read_arguments(config_class: type[Config], presets: Mapping[str, dict[str, Any]] | None = None) -> Config:
    """`load_config` of this process's arguments; a bad one ends in one line and exit code 2.

    From now on Ctrl-C and SIGTERM end the script in one line too.
    """
    known: list[Config] = []
    if config_class.__module__ == "__main__":
        end_on_signals(lambda: how_to_go_on(known[0]) if known else "")
    try:
        known.append(load_config(config_class, sys.argv[1:], presets))
        return known[0]
    except InputError as error:
        fail(str(error))
    except OSError as error:  # such as a name that is too long
        fail(f"{error.filename}: {error.strerror}")


def load_config(
    config_class: type[Config], argv: list[str], presets: Mapping[str, dict[str, Any]] | None = None
) -> Config:
    """Defaults of the dataclass, then the YAML file of --config, then key=value overrides.

    Args:
        presets: fields by name of a protocol; those of config.protocol come right after the defaults.

    Raises:
        InputError: unknown key, wrong type, bad choice, out of bounds, unreadable file; the message
            names the key.
    """
    parser = Parser(
        description=sys.modules[config_class.__module__].__doc__,
        epilog=describe(config_class),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with fields of the config")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields; they win over the file")
    options = parser.parse_args(argv)
    for override in options.overrides:
        if "=" not in override:
            raise InputError(f"{override or 'an empty argument'}: expected key=value")
    if options.config and Path(options.config).is_dir():
        raise InputError(f"{options.config}: a folder, expected a YAML file")

    # Lay the sources over each other, later ones on top.
    layers = [OmegaConf.structured(config_class)]
    try:
        if options.config:
            layers.append(OmegaConf.load(options.config))
        layers += [override_layer(config_class, override) for override in options.overrides]
        for layer in layers[1:]:
            if isinstance(layer, DictConfig):  # a list is refused below
                check_booleans(config_class, layer)
        if presets:
            layers.insert(1, presets[OmegaConf.merge(*layers).protocol])
        config = OmegaConf.to_object(OmegaConf.merge(*layers))
    except OmegaConfBaseException as error:
        key = f"config key {error.full_key}: " if error.full_key else ""
        raise InputError(key + str(error).splitlines()[0]) from error
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{options.config}: no such config file") from error
    except Exception as error:  # the YAML parser's own kinds
        reason = " ".join(str(error).split())
        where = options.config or " ".join(options.overrides)
        raise InputError(f"{where}: not YAML ({reason})") from error

    # Bounds that stand with the fields, then what only several fields together can get wrong.
    check_bounds(config)
    if hasattr(config, "check"):
        config.check()
    return config


def override_layer(config_class: type, override: str) -> DictConfig:
    """One key=value. Below a field that is a dict the rest is one key: rewards.mymodule.myreward=1."""
    key, _, value = override.partition("=")
    name, _, entry = key.partition(".")
    if not entry or get_origin(get_type_hints(config_class).get(name)) is not dict:
        return OmegaConf.from_dotlist([override])
    parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"{name}={value}"]))
    return OmegaConf.create({name: {entry: parsed[name]}})


def check_bounds(config: Any) -> None:
    """Refuse numbers that are none (nan, inf), or outside the bounds of their field.

    Raises:
        InputError: naming the field.
    """
    for f in dataclasses.fields(config):
        # The bounds of the field. `above` makes the usual `at_least=0` superfluous.
        value = getattr(config, f.name)
        bounds = {name: f.metadata.get(name) for name in BOUNDS}
        if bounds["above"] is not None:
            bounds["at_least"] = None
        bounds = {name: bound for name, bound in bounds.items() if bound is not None}
        expected = " and ".join(f"{BOUNDS[name][1]} {bound}" for name, bound in bounds.items())

        # Its items if it is a list, its numbers, or its text.
        if str(f.type).startswith("list"):
            if any(isinstance(item, list | dict) for item in value):
                raise InputError(f"config key {f.name}: {value}, expected a list without lists in it")
            if len(set(value)) < len(value):
                raise InputError(f"config key {f.name}: {value}, expected no item twice")
        for number in numbers_in(value):
            if not -LARGEST <= number <= LARGEST:  # nan is not either
                raise InputError(f"config key {f.name}: {value}, expected a finite number of usual size")
            if not all(BOUNDS[name][0](number, bound) for name, bound in bounds.items()):
                raise InputError(f"config key {f.name}: {value}, expected {expected}")
        if isinstance(value, str) and ("\0" in value or (f.default and not value.strip())):
            raise InputError(f"config key {f.name}: {value!r}, expected a text")
        holds = f.metadata.get("holds", "")
        if holds and holds not in value:
            raise InputError(f"config key {f.name}: {value!r}, expected a text with {holds} in it")


def check_booleans(config_class: type, given: Any) -> None:
    """Refuse numbers other than 0 and 1 for fields that are true or false: they would all be true.

    Raises:
        InputError: naming the field.
    """
    for f in dataclasses.fields(config_class):
        value = given.get(f.name) if f.type == "bool" else None
        if isinstance(value, int | float) and value not in (0, 1):
            raise InputError(f"config key {f.name}: {value}, expected true or false")


def numbers_in(value: Any) -> list[float]:
    """The numbers of a field: itself, or those of a list or a dict."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]


# ---------------------------------------------------------------------------- documentation


@dataclass
class FieldDoc:
    """A field as `--help` and docs/config.md show it."""

    name: str
    default: str  # as it would be typed
    meaning: str
    heading: str
    may_change: bool  # when the run is resumed


def default_of(field: dataclasses.Field) -> Any:
    """The default of a dataclass's field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def changed_fields(config: Any) -> dict[str, Any]:
    """The defaults of the fields of a dataclass's object that have another value, by name."""
    defaults = {f.name: default_of(f) for f in dataclasses.fields(config)}
    return {name: default for name, default in defaults.items() if getattr(config, name) != default}


def field_docs(config_class: type) -> list[FieldDoc]:
    """Every field of a config class, in order, with its default and its meaning."""
    hints, docs = get_type_hints(config_class), []
    for f in dataclasses.fields(config_class):
        default = default_of(f)
        meaning = f.metadata.get("meaning", "")
        choices = get_args(hints[f.name]) if isinstance(default, str) else ()
        if choices:
            meaning = f"{' | '.join(choices)}: {meaning}"
        heading, free = f.metadata.get("heading", ""), f.metadata.get("may_change", False)
        docs.append(FieldDoc(f.name, as_typed(default), meaning, heading, free))
    return docs


def as_typed(value: Any) -> str:
    """A default as it stands in key=value: true, [a, b], {a: 1.0}."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(as_typed, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {as_typed(v)}" for key, v in value.items()) + "}"
    return str(value).replace("\n", "\\n") or '""'


def describe(config_class: type) -> str:
    """The fields for --help: grouped, each with its default and what it means."""
    lines = ["fields, with their defaults:"]
    for doc in field_docs(config_class):
        if doc.heading:
            lines += ["", f"{doc.heading}:"]
        start = f"  {doc.name}={doc.default}"
        text = textwrap.wrap(doc.meaning, 66) or [""]
        if len(start) > 32:
            lines.append(start)
            start = ""
        lines.append(f"{start:<34}{text[0]}")
        lines += [" " * 34 + rest for rest in text[1:]]
    return "\n".join(lines)


# --------------------------------------------------------------------- what both stages have


@dataclass
class TrainConfig:
    """Fields that sft.py and dipo.py share."""

    model: str = setting(
        "tiny", "checkpoint folder or hub id; tiny: a small random one is made in the run", heading="Run"
    )
    out: str = setting("runs/train", "the run directory: config, metrics, checkpoints", may_change=True)
    resume: Any = setting(
        False,
        "true: go on from the newest checkpoint in out; force: even if it is another run",
        may_change=True,
    )
    seed: int = setting(0, "of the data order, the noise and the rollouts")
    block_size: int = setting(0, "tokens per block; 0: config.json's, else by name, else 4")
    prompt: str = setting("{question}", "the user's turn; {question} is replaced", holds="{question}")

    steps: int = setting(
        100, "optimizer steps (SFT) or rollout batches (DiPO)", above=0, heading="Optimizer", may_change=True
    )
    lr: float = setting(1e-5, "peak learning rate", above=0)
    schedule: Literal["constant", "cosine"] = setting("constant", "learning rate after the warmup")
    warmup_steps: int = setting(0, "optimizer updates of linear warmup")
    adam_beta1: float = setting(0.9, "AdamW: decay of the first moment", below=1)
    adam_beta2: float = setting(0.95, "AdamW: decay of the second moment", below=1)
    weight_decay: float = setting(0.0, "AdamW: decay of the weights")
    max_grad_norm: float = setting(1.0, "the gradient's norm is clipped to this", above=0)
    max_skipped: int = setting(
        3, "so many steps in a row without a finite loss and gradient end the run", above=0, may_change=True
    )
    too_long: Literal["error", "leave_out"] = setting(
        "error", "what to do about records of the data that are longer than max_tokens or the model allow"
    )

    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "of the computation; weights stay float32", heading="Memory and speed"
    )
    token_budget: int = setting(16384, "packed tokens per forward pass and rank", above=0, may_change=True)
    reduce_once: bool = setting(
        True,
        "sum gradients over ranks once per update; every rank holds them whole till then",
        may_change=True,
    )
    checkpointing: Literal["none", "selective", "full"] = setting(
        "none", "activations that are computed twice instead of kept", may_change=True
    )
    compile: bool = setting(False, "torch.compile of every decoder layer", may_change=True)
    lora_rank: int = setting(0, "train adapters of this rank only, in one process (peft); 0: all weights")
    cpu_offload: bool = setting(
        False, "weights, gradients and moments wait in the host's memory", may_change=True
    )
    check_memory: bool = setting(
        True, "refuse at the start what needs more memory than the GPU has", may_change=True
    )

    save_every: int = setting(
        0, "steps between checkpoints; 0: only the last", heading="Checkpoints and logs", may_change=True
    )
    keep_checkpoints: int = setting(2, "how many stay on disk", above=0, may_change=True)
    log_to: Literal["auto", "none", "tensorboard", "wandb"] = setting(
        "auto", "where metrics go beside metrics.jsonl; auto: wandb if it has a project", may_change=True
    )
    wandb: str = setting("", "the project there; empty: nanodirl", may_change=True)

    eval_data: str = setting(
        "",
        "question file evaluated while training; empty: none",
        heading="Evaluation while training",
        may_change=True,
    )
    eval_every: int = setting(0, "steps between evaluations; 0: never", may_change=True)
    eval_limit: int = setting(0, "only the first so many questions; 0: all", may_change=True)
    eval_max_tokens: int = setting(64, "new tokens per response", above=0, may_change=True)
    eval_threshold: float = setting(0.9, "of the dynamic, greedy decoding", at_most=1, may_change=True)

    engine: EngineName = setting("auto", "lmdeploy where it can run, else torch", heading="Rollout engine")
    max_batch: int = setting(256, "responses that the engine generates at once", above=0, may_change=True)
    cache_gib: float = setting(
        0.0, "lmdeploy's key/value cache; 0: what weights, moments and the engine leave", may_change=True
    )

    def check(self) -> None:
        """Refuse what only several fields together can get wrong.

        Raises:
            InputError: naming the field.
        """
        if self.lora_rank and self.cpu_offload:
            raise InputError("config key cpu_offload: with lora_rank nothing is sharded, so nothing waits")
        if self.wandb and self.log_to == "tensorboard":
            raise InputError(f"config key wandb: {self.wandb}, expected none with log_to=tensorboard")
        if self.eval_every and not self.eval_data:
            raise InputError("config key eval_data: expected a question file, since eval_every is set")
        if self.eval_data and not self.eval_every:
            raise InputError("config key eval_every: expected how often, since eval_data is set")
        if self.eval_every:
            check_file(self.eval_data)
        if self.resume not in (True, False, "force"):
            raise InputError(f"config key resume: {self.resume}, expected true, false or force")


def check_sources(config: TrainConfig) -> None:
    """Refuse a data file or a checkpoint folder that is not there; a resumed run has a checkpoint of its own.

    Raises:
        InputError: naming it.
    """
    check_file(config.data, "python data/tiny.py makes data/generated, python data/download.py data/hub")
    if config.model != "tiny" and not config.resume:
        check_model(config.model)


def how_to_go_on(config: Any) -> str:
    """What the last line of an interrupted run says: what is there, and how to go on."""
    if not hasattr(config, "out"):
        return ""
    if not hasattr(config, "resume"):
        return f": {config.out} has all that was done; the same command goes on from there"
    done = checkpoints(Path(config.out))
    newest = done[-1].name if done else "no checkpoint"
    return f": {config.out} has {newest}; the same command with resume=true goes on from there"


def check_file(path: str, otherwise: str = "") -> None:
    """Refuse a data file that is not there.

    Args:
        otherwise: how it would be made.
    """
    if Path(path).is_dir():
        raise InputError(f"{path or 'an empty name'}: a folder, expected a data file")
    if not Path(path).is_file():
        raise InputError(f"{path}: no such data file" + (f": {otherwise}" if otherwise else ""))
