"""Evaluation: a checkpoint answers the questions of a file, and every answer is graded.

For each decoding rule (static, dynamic) every question gets `samples` answers. Reported: accuracy
(mean over the samples), pass@k (some sample is right), tokens per forward, mean length of what the
user sees, truncated answers (always wrong), and tokens per second. The protocol goes into
summary.json beside the figures, since the same weights score very differently under another one.

    python evaluate.py model=runs/demo/dipo/latest data=data/generated/test.jsonl
    python evaluate.py --config configs/eval.yaml model=JetLM/SDAR-8B-Chat data=gsm8k.jsonl

This is the first script of the chain, so what the other two share with it lives here as well: the
config loader, the readers of question files, the exit code for bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

import reward
from masking import InputError
from model import find_folder, is_block_diffusion, load, load_tokenizer, stop_ids, writing
from rollout import (
    Decoding,
    Engine,
    LMDeployEngine,
    Rollout,
    TorchEngine,
    generate_all,
    lmdeploy_problem,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from transformers import PreTrainedTokenizerFast

Config = TypeVar("Config")
Rule = Literal["dynamic", "static", "sequential"]
EngineName = Literal["auto", "lmdeploy", "torch"]


@dataclass
class EvalConfig:
    """Fields of evaluate.py."""

    model: str = "runs/demo/dipo/latest"  # checkpoint folder or hub id
    data: str = "data/generated/test.jsonl"  # question file, JSON list or JSON Lines
    out: str = "runs/eval"  # summary.json and responses-RULE.jsonl go here
    rules: list[Rule] = field(default_factory=lambda: ["static", "dynamic"])  # decoding rules
    samples: int = 1  # answers per question (k)
    limit: int = 0  # only the first so many questions; 0: all
    prompt: str = "{question}"  # the user's turn; {question} is replaced
    threshold: float = 0.9  # dynamic: confidence that is enough to reveal
    denoising_steps: int = 4  # static, sequential: steps per block
    temperature: float = 1.0  # of the softmax that tokens and confidences come from
    top_k: int = 1  # 1: greedy; 0: off
    top_p: float = 1.0  # nucleus; 1: off
    max_tokens: int = 256  # new tokens per answer
    block_size: int = 0  # tokens per block; 0: the checkpoint's, or 4
    max_batch: int = 256  # answers generated at once
    seed: int = 0  # of the sampling
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights; lmdeploy has bfloat16
    engine: EngineName = "auto"  # auto: lmdeploy where it can run, else torch
    cache_gib: float = 0.0  # lmdeploy's key/value cache; 0: 40 % of the free GPU memory
    tensor_parallel: int = 1  # GPUs per engine; only 1 works


@dataclass
class Question:
    """A question with its gold answer."""

    text: str
    gold: str


@dataclass
class Answer:
    """A rollout with its grade."""

    rollout: Rollout
    graded: reward.Graded


class Parser(argparse.ArgumentParser):
    """Reports a bad option in one line, without the usage text."""

    def error(self, message: str):
        raise InputError(message)


def load_config(config_class: type[Config], argv: list[str]) -> Config:
    """Defaults of the dataclass, then the YAML file of --config, then key=value overrides.

    Raises:
        InputError: unknown key, wrong type, bad choice, unreadable file; the message names the key.
    """
    parser = Parser(
        description=sys.modules[config_class.__module__].__doc__,
        epilog="fields and defaults:\n" + OmegaConf.to_yaml(OmegaConf.structured(config_class)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with fields of the config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(argv)
    for override in options.overrides:
        if "=" not in override:
            raise InputError(f"{override}: expected key=value")
    layers = [OmegaConf.structured(config_class)]
    try:
        if options.config:
            layers.append(OmegaConf.load(options.config))
        layers.append(OmegaConf.from_dotlist(options.overrides))
        return OmegaConf.to_object(OmegaConf.merge(*layers))
    except OmegaConfBaseException as error:
        key = f"config key {error.full_key}: " if error.full_key else ""
        raise InputError(key + str(error).splitlines()[0]) from error
    except FileNotFoundError as error:
        raise InputError(f"{options.config}: no such config file") from error
    except Exception as error:  # the YAML parser's own kinds
        reason = " ".join(str(error).split())
        where = options.config or " ".join(options.overrides)
        raise InputError(f"{where}: not YAML ({reason})") from error


def run_script(main: Callable[[list[str]], None]) -> None:
    """Call main(arguments); bad input and a full disk end in one line and exit code 2."""
    disable_progress_bar()  # transformers' own, for every file it reads
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(_fail(str(error)))
    except OSError as error:
        sys.exit(_fail(f"{error.filename or 'file system'}: {error.strerror or error}"))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _fail(message: str) -> int:
    tqdm.write(f"error: {' '.join(message.split())}", file=sys.stderr)  # above open progress bars
    return 2


def read_rows(path: str) -> list[tuple[str, dict[str, Any]]]:
    """(where, row) pairs of a JSON list or JSON Lines file; `where` names file and line.

    Raises:
        InputError: missing, empty or malformed file, or a row that is no object.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{path}: no such data file")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error
    rows = []
    if text.lstrip().startswith("["):
        try:
            rows = [(f"{path}: row {i + 1}", row) for i, row in enumerate(json.loads(text))]
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not JSON ({error})") from error
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                rows.append((f"{path}:{number}", json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}:{number}: not JSON ({getattr(error, 'msg', error)})") from error
    if not rows:
        raise InputError(f"{path}: no rows")
    for where, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected an object, found {type(row).__name__}")
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: half of a surrogate pair is no text") from error
    return rows


def read_questions(path: str) -> list[Question]:
    """Questions of a file in any of the formats of data/README.md.

    Raises:
        InputError: a row without a question or without an answer.
    """
    questions = []
    for where, row in read_rows(path):
        text = row.get("question", row.get("problem"))
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{where}: no question (expected a text in `question` or `problem`)")
        names = ("ground_truth_answer", "answer", "final_answer")
        gold = next((row[name] for name in names if row.get(name) not in (None, "", [])), None)
        if isinstance(gold, list):
            gold = ", ".join(map(str, gold))
        gold = str(gold).rpartition("####")[2].strip() if isinstance(gold, str | int | float) else ""
        if not gold:
            raise InputError(f"{where}: no answer (expected one of {', '.join(names)})")
        questions.append(Question(text, gold))
    return questions


def encode_prompt(tokenizer: PreTrainedTokenizerFast, user_turn: str) -> list[int]:
    """Token ids of a chat with one user turn, ready for the assistant's."""
    chat = [{"role": "user", "content": user_turn}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def choose_block_size(wanted: int, model_config: Any) -> int:
    """The block size to use: the config's, or the checkpoint's, or 4 as in published SDAR.

    Raises:
        InputError: both are given and differ.
    """
    trained = getattr(model_config, "block_size", None)
    if wanted < 0 or (wanted and trained and wanted != trained):
        raise InputError(f"config key block_size: {wanted}, but the checkpoint has {trained}")
    return wanted or trained or 4


def make_engine(
    checkpoint: str, tokenizer: PreTrainedTokenizerFast, block_size: int, config: Any, log: Path
) -> Engine:
    """The rollout engine for a checkpoint, as config.engine says; the choice is printed.

    Args:
        config: has engine, max_batch, dtype, cache_gib and tensor_parallel.
        log: what an engine in a subprocess prints goes there.

    Raises:
        InputError: the engine cannot run here, or not this model.
    """
    if config.tensor_parallel != 1:
        raise InputError(f"config key tensor_parallel: {config.tensor_parallel}, only 1 works so far")
    cuda, folder = torch.cuda.is_available(), find_folder(checkpoint)
    name = config.engine
    if name == "auto":
        name = "torch" if lmdeploy_problem() else "lmdeploy"
    if not dist.is_initialized() or dist.get_rank() == 0:
        tqdm.write(f"engine: {name}", file=sys.stderr)
    if name == "lmdeploy":
        diffusion = is_block_diffusion(folder)
        b = choose_block_size(block_size, AutoConfig.from_pretrained(folder)) if diffusion else 0
        dtype = "bfloat16" if cuda else config.dtype
        return LMDeployEngine(
            checkpoint, b, tokenizer.mask_token_id, stop_ids(tokenizer),
            config.max_batch, dtype, config.cache_gib, log,
        )  # fmt: skip
    model = load(checkpoint, getattr(torch, config.dtype), "cuda" if cuda else "cpu")
    b = choose_block_size(block_size, model.config)
    return TorchEngine(model, b, tokenizer.mask_token_id, stop_ids(tokenizer), config.max_batch)


def grade_rollouts(
    tokenizer: PreTrainedTokenizerFast, rollouts: list[Rollout], golds: list[str], block_size: int
) -> list[Answer]:
    """Decode and grade each rollout against its gold answer."""
    answers = []
    for rollout, gold in zip(rollouts, golds, strict=True):
        graded = reward.grade(
            tokenizer.decode(rollout.visible_ids, skip_special_tokens=True),
            gold,
            num_tokens=rollout.num_tokens,
            truncated=rollout.finish_reason == "length",
            tokens_per_forward=rollout.tokens_per_forward,
            block_size=block_size,
        )
        answers.append(Answer(rollout, graded))
    return answers


def answer_questions(
    engine: Engine,
    tokenizer: PreTrainedTokenizerFast,
    questions: list[Question],
    how: Decoding,
    block_size: int,
    samples: int = 1,
    prompt: str = "{question}",
    seed: int = 0,
    title: str = "answers",
    weights: Callable[[], Iterable[tuple[str, torch.Tensor]]] | None = None,
) -> list[list[Answer]]:
    """`samples` graded answers to each question; under torchrun every rank answers its share.

    Args:
        weights: see `rollout.generate_all`; needed if the engine's are not the checkpoint's.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = range(rank, len(questions), world)
    prompts = [encode_prompt(tokenizer, prompt.replace("{question}", questions[i].text)) for i in mine]
    with tqdm(total=len(prompts) * samples, desc=title, unit="answer", disable=rank > 0) as bar:
        rollouts = generate_all(
            engine,
            [ids for ids in prompts for _ in range(samples)],
            [seed + i * samples + j for i in mine for j in range(samples)],
            how,
            done=lambda rollout: bar.update(),
            weights=weights,
        )
    golds = [questions[i].gold for i in mine for _ in range(samples)]
    answers = grade_rollouts(tokenizer, rollouts, golds, block_size)
    share = [answers[n : n + samples] for n in range(0, len(answers), samples)]
    shares = [share]
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, share)
    return [shares[i % world][i // world] for i in range(len(questions))]


def summarize(answers: list[list[Answer]]) -> dict[str, float]:
    """Figures over questions x samples."""
    flat = [a for group in answers for a in group]
    mean = len(flat)
    return {
        "questions": len(answers),
        "samples": len(flat) // len(answers),
        "accuracy": sum(a.graded.correct for a in flat) / mean,
        "pass_at_k": sum(any(a.graded.correct for a in g) for g in answers) / len(answers),
        "tpf": sum(len(a.rollout.response_ids) for a in flat) / sum(a.rollout.num_steps for a in flat),
        "tokens": sum(a.rollout.num_tokens for a in flat) / mean,
        "truncated": sum(a.graded.truncated for a in flat) / mean,
    }


def table(rows: dict[str, dict[str, float]]) -> str:
    """A Markdown table with a line per decoding rule (or checkpoint)."""
    lines = [
        "| | questions | k | accuracy | pass@k | TPF | tokens | truncated | tokens/s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, s in rows.items():
        lines.append(
            f"| {name} | {s['questions']} | {s['samples']} | {100 * s['accuracy']:.1f} % "
            f"| {100 * s['pass_at_k']:.1f} % | {s['tpf']:.2f} | {s['tokens']:.1f} "
            f"| {100 * s['truncated']:.1f} % | {s['tokens_per_second']:.0f} |"
        )
    return "\n".join(lines)


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is there completely or not at all."""
    part = path.with_name(path.name + ".part")
    with writing(part):
        part.write_text(json.dumps(content, indent=2) + "\n")
    part.replace(path)


def answer_record(question: Question, answer: Answer) -> dict[str, Any]:
    """What is kept of an answer on disk."""
    r, g = answer.rollout, answer.graded
    return {
        "question": question.text,
        "gold": question.gold,
        "answer": g.answer,
        "correct": g.correct,
        "text": g.text,
        "tpf": r.tokens_per_forward,
        "num_tokens": r.num_tokens,
        "finish_reason": r.finish_reason,
        "seed": r.seed,
        "steps": r.steps,
    }


def main(argv: list[str]) -> None:
    """Evaluate one checkpoint on one file."""
    config = load_config(EvalConfig, argv)
    if min(config.samples, config.max_tokens, config.max_batch, len(config.rules)) < 1:
        raise InputError("config keys samples, max_tokens, max_batch and rules: expected at least 1")
    for name in ("denoising_steps", "temperature"):
        if not getattr(config, name) > 0:
            raise InputError(f"config key {name}: expected more than 0")
    for name in ("limit", "top_k", "top_p", "threshold", "block_size"):
        if not getattr(config, name) >= 0:
            raise InputError(f"config key {name}: expected 0 or more")
    questions = read_questions(config.data)
    questions = questions[: config.limit or len(questions)]
    tokenizer = load_tokenizer(config.model)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    engine = make_engine(config.model, tokenizer, config.block_size, config, out / "engine.log")
    summaries = {}
    for rule in config.rules if is_block_diffusion(find_folder(config.model)) else ["autoregressive"]:
        how = Decoding.from_config(config, rule=rule)
        start = time.perf_counter()
        answers = answer_questions(
            engine, tokenizer, questions, how, engine.block_size,
            config.samples, config.prompt, config.seed, rule,
        )  # fmt: skip
        summaries[rule] = s = summarize(answers)
        s["seconds"] = time.perf_counter() - start
        s["tokens_per_second"] = s["tokens"] * s["questions"] * s["samples"] / s["seconds"]
        path = out / f"responses-{rule}.jsonl"
        with writing(path), open(path, "w") as file:
            for question, group in zip(questions, answers, strict=True):
                for answer in group:
                    file.write(json.dumps(answer_record(question, answer)) + "\n")
    config.model = str(find_folder(config.model))
    write_json(out / "summary.json", {"config": dataclasses.asdict(config), **summaries})
    print(table(summaries))
    print(f"\nwrote {out}/summary.json and the responses beside it")
    engine.close()


if __name__ == "__main__":
    run_script(main)
