r"""Evaluation: a checkpoint answers the questions of benchmarks, and every answer is graded.

For each decoding rule (static, dynamic) every question gets `samples` answers. Reported: accuracy
(mean@k, with a 95 % interval by bootstrap over the questions), pass@k, maj@k, tokens per forward, mean
length of what the user sees, truncated answers (always wrong), and tokens per second. The same weights
score very differently under another protocol (SDAR-8B-Chat on MATH500: published as 52.6, 71.9 and
78.6), so it has a name (`protocol`), and its every setting goes into summary.json beside the figures.

    python evaluate.py                                                # the demo's checkpoint
    python evaluate.py model=JetLM/SDAR-8B-Chat protocol=dirl data=[math500,aime24]
    torchrun --nproc_per_node 8 evaluate.py --config configs/eval.yaml data=olympiadbench
    python evaluate.py sweep=[0.5,0.7,0.9,0.99] samples=4             # thresholds: sweep.png
    python evaluate.py compare=[runs/a,runs/b]                        # paired bootstrap of two runs

Finished answers are on disk at once: the same command goes on where it was interrupted, and under
torchrun every rank answers its share (one file system is assumed). Left out on purpose: prompts with
worked examples, graders other than reward.py's.

This is the first script of the chain, so what the other two share with it lives here as well: the
config loader, the readers of question files, the process group, the exit code for bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

import report
import reward
from masking import InputError
from model import find_folder, is_block_diffusion, load, load_tokenizer, stop_ids, writing
from report import BENCHMARKS, Results, table
from rollout import (
    Decoding,
    Engine,
    LMDeployEngine,
    Rollout,
    TorchEngine,
    gather,
    generate_all,
    lmdeploy_problem,
    rank_and_world,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from transformers import PreTrainedTokenizerFast

Config = TypeVar("Config")
Rule = Literal["dynamic", "static", "sequential"]
EngineName = Literal["auto", "lmdeploy", "torch"]

BACKEND = "cpu:gloo,cuda:nccl"  # what waits in the host's memory, and rollouts, travel by gloo
BOXED = "{question}\nPlease reason step by step, and put your final answer within $\\boxed{}$."
# What a protocol sets; the config file and key=value win over it.
PROTOCOLS: dict[str, dict[str, Any]] = {
    "none": {},
    "greedy": {"prompt": BOXED, "top_k": 1, "max_tokens": 8192},  # nobody's: one answer, without chance
    "dirl": {  # DiRL: [paper] arXiv 2512.22234, Table 1; [release] evaluation of github OpenMOSS/DiRL
        "prompt": BOXED,  # [release]
        "samples": 16,  # per question [release]
        "temperature": 1.0,  # [release]
        "top_k": 50,  # [release]
        "top_p": 1.0,  # [release]
        "threshold": 0.9,  # of "dynamic" [paper]
        "denoising_steps": 4,  # "static" reveals one token per forward, with blocks of 4 [paper]
        "max_tokens": 8192,  # [paper]
        "min_tokens": 128,  # [release]
        "banned": ["<|endoftext|>"],  # so that answers stop at <|im_end|> [release]
        "dtype": "bfloat16",  # [release]
    },
}


@dataclass
class EvalConfig:
    """Fields of evaluate.py."""

    model: str = "runs/demo/dipo/latest"  # checkpoint folder or hub id
    data: Any = "runs/demo/data/test.jsonl"  # question file or name of a benchmark, or a list of them
    out: str = "runs/eval"  # responses, summary.json and table.md go here
    protocol: Literal["none", "greedy", "dirl"] = "none"  # sets other fields: PROTOCOLS in evaluate.py
    rules: list[Rule] = field(default_factory=lambda: ["static", "dynamic"])  # decoding rules
    samples: int = 1  # answers per question (k)
    sweep: list[float] = field(default_factory=list)  # dynamic at each of these thresholds; sweep.png
    compare: list[str] = field(default_factory=list)  # two finished runs; then nothing is generated
    limit: int = 0  # only the first so many questions of each file; 0: all
    prompt: str = "{question}"  # the user's turn; {question} is replaced
    threshold: float = 0.9  # dynamic: confidence that is enough to reveal
    denoising_steps: int = 4  # static, sequential: steps per block
    temperature: float = 1.0  # of the softmax that tokens and confidences come from
    top_k: int = 1  # 1: greedy; 0: off
    top_p: float = 1.0  # nucleus; 1: off
    max_tokens: int = 256  # new tokens per answer
    min_tokens: int = 0  # a block that begins before so many new tokens has no stop token
    banned: list[str] = field(default_factory=list)  # tokens that are never drawn
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
    tolerance: float | None = None  # how far a number may be from the gold one, absolutely


@dataclass
class Answer:
    """A rollout with its grade."""

    rollout: Rollout
    graded: reward.Graded


class Parser(argparse.ArgumentParser):
    """Reports a bad option in one line, without the usage text."""

    def error(self, message: str):
        raise InputError(message)


def load_config(
    config_class: type[Config], argv: list[str], presets: Mapping[str, dict[str, Any]] | None = None
) -> Config:
    """Defaults of the dataclass, then the YAML file of --config, then key=value overrides.

    Args:
        presets: fields by name of a protocol; those of config.protocol come right after the defaults.

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
        if presets:
            layers.insert(1, presets[OmegaConf.merge(*layers).protocol])
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


def start_distributed(backend: str = "") -> tuple[int, int, torch.device]:
    """(rank, world size, device); starts the process group under torchrun, by default gloo or NCCL."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group(backend or (BACKEND if cuda else "gloo"), timeout=timedelta(hours=2))
    return *rank_and_world(), device


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
        if isinstance(row.get("unit"), str) and row["unit"].strip():  # OlympiadBench
            gold = f"{gold} {row['unit'].strip()}"
        try:
            tolerance = float(str(row["error"]).strip(",").split(",")[0]) if row.get("error") else None
        except (TypeError, ValueError):
            raise InputError(f"{where}: `error` is {row['error']!r}, expected a tolerance") from None
        questions.append(Question(text, gold, tolerance))
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
    if rank_and_world()[0] == 0:
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
    tokenizer: PreTrainedTokenizerFast,
    rollouts: list[Rollout],
    questions: list[Question],
    block_size: int,
    max_tokens: int,
) -> list[Answer]:
    """Decode and grade each rollout of as many questions, by this rank's share of the cores."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    graded = reward.grade_all(
        [tokenizer.decode(r.visible_ids, skip_special_tokens=True) for r in rollouts],
        [q.gold for q in questions],
        num_tokens=[r.num_tokens for r in rollouts],
        truncated=[r.finish_reason == "length" for r in rollouts],
        tokens_per_forward=[r.tokens_per_forward for r in rollouts],
        block_size=block_size,
        max_tokens=max_tokens,
        tolerances=[q.tolerance for q in questions],
        workers=max(1, cores),
    )
    return [Answer(rollout, grade) for rollout, grade in zip(rollouts, graded, strict=True)]


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
    known: Mapping[int, Rollout] | None = None,
    done: Callable[[Rollout], None] = lambda rollout: None,
) -> list[list[Answer]]:
    """`samples` graded answers to each question; under torchrun every rank answers its share.

    Args:
        weights: see `rollout.generate_all`; needed if the engine's are not the checkpoint's.
        known: answers that are there already, by seed: sample j of question i has
            seed + i * samples + j.
        done: sees each new rollout as it ends.
    """
    rank, world = rank_and_world()
    mine = range(rank, len(questions), world)
    prompts = {i: encode_prompt(tokenizer, prompt.replace("{question}", questions[i].text)) for i in mine}
    requests = [(i, seed + i * samples + j) for i in mine for j in range(samples)]
    known = known or {}
    rollouts = {s: dataclasses.replace(known[s], prompt_ids=prompts[i]) for i, s in requests if s in known}
    todo = [(i, s) for i, s in requests if s not in rollouts]
    start, total = len(rollouts), len(requests)
    with tqdm(initial=start, total=total, desc=title, unit="answer", disable=rank > 0) as bar:

        def ended(rollout: Rollout) -> None:
            bar.update()
            done(rollout)

        prompts_todo, seeds = [prompts[i] for i, _ in todo], [s for _, s in todo]
        new = generate_all(engine, prompts_todo, seeds, how, ended, weights)
    rollouts |= zip(seeds, new, strict=True)
    asked = [questions[i] for i, _ in requests]
    given = [rollouts[s] for _, s in requests]
    answers = grade_rollouts(tokenizer, given, asked, block_size, how.max_tokens)
    shares = gather([answers[n : n + samples] for n in range(0, len(answers), samples)])
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


def full_summary(answers: list[list[Answer]]) -> dict[str, Any]:
    """`summarize`, and the figures that are of no use during training."""
    correct = [[a.graded.correct for a in group] for group in answers]
    k = len(correct[0])
    low, high = report.bootstrap_interval([fmean(c) for c in correct])
    powers = [2**i for i in range(k.bit_length()) if 2**i < k] + [k]
    return summarize(answers) | {
        "accuracy_low": low,
        "accuracy_high": high,
        "pass_at": {str(j): fmean(report.pass_at_k(k, sum(c), j) for c in correct) for j in powers},
        "maj_at_k": fmean(majority_is_right(group) for group in answers),
    }


def majority_is_right(group: list[Answer]) -> bool:
    """maj@k of one question. Truncated samples have no vote: they are wrong whatever their box says."""
    graded = [a.graded for a in group]
    winner = report.majority([None if g.truncated else g.answer for g in graded])
    return winner is not None and graded[winner].correct


# ------------------------------------------------------------------------------- answers kept on disk


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
        "prompt_tokens": len(r.prompt_ids),
        "num_tokens": r.num_tokens,
        "finish_reason": r.finish_reason,
        "seed": r.seed,
        "steps": r.steps,
    }


def claim_folder(out: Path, config: EvalConfig, benchmarks: dict[str, list[Question]]) -> None:
    """Note what decides the answers in out/config.json, if no other run's answers are there.

    Raises:
        InputError: they are; what was asked before and is not now goes on where it stopped.
    """
    free = ("out", "max_batch", "cache_gib", "tensor_parallel")  # another value, the same answers
    run = {name: value for name, value in dataclasses.asdict(config).items() if name not in free}
    run["model"] = str(find_folder(config.model).resolve())
    files = sorted(Path(run["model"]).glob("model*.safetensors"))
    run["weights"] = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    texts = {n: json.dumps([dataclasses.astuple(q) for q in qs]) for n, qs in benchmarks.items()}
    run["questions"] = {n: hashlib.sha256(text.encode()).hexdigest() for n, text in texts.items()}
    file = out / "config.json"
    if any(f.stat().st_size for f in out.glob("responses-*.jsonl")):
        before = json.loads(file.read_text()) if file.exists() else {}
        changed = [name for name in run if before.get(name) != json.loads(json.dumps(run[name]))]
        if changed:
            raise InputError(
                f"config key {changed[0]}: {out} holds answers with another value of it; remove that folder, "
                "or give another out"
            )
    out.mkdir(parents=True, exist_ok=True)
    if rank_and_world()[0] == 0:
        write_json(file, run)


def read_kept(out: Path, name: str) -> dict[int, dict[str, Any]]:
    """Finished answers by seed, of a complete run or of the ranks of an interrupted one.

    What stands after the last line break was being written when the run was interrupted: dropped.
    """
    kept = {}
    for file in (out / f"{name}.jsonl", *out.glob(f"{glob.escape(name)}.rank*.jsonl")):
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                kept[row["seed"]] = row
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{file}:{number}: not an answer; remove {out} to start again") from error
    return kept


def answer_and_keep(
    engine: Engine,
    tokenizer: PreTrainedTokenizerFast,
    questions: list[Question],
    how: Decoding,
    config: EvalConfig,
    name: str,
) -> dict[str, Any]:
    """Answer what is not yet on disk, keep each answer as it ends; the figures of all.

    While it runs, rank r appends to NAME.rankR.jsonl; in the end rank 0 writes NAME.jsonl, in order.
    `seconds` is when an answer ended, without the time between an interruption and its resumption.
    """
    out, rank = Path(config.out), rank_and_world()[0]
    kept = read_kept(out, name)
    fields = ("response_ids", "steps", "num_tokens", "finish_reason", "seed")
    known = {
        seed: Rollout(prompt_ids=[], logprobs=[], hold_bounds=[], **{f: row[f] for f in fields})
        for seed, row in kept.items()
    }
    seconds = {seed: row["seconds"] for seed, row in kept.items()}
    start = time.perf_counter() - max(seconds.values(), default=0.0)
    part = out / f"{name}.rank{rank}.jsonl"
    if part.exists():
        os.truncate(part, part.read_bytes().rfind(b"\n") + 1)
    with writing(part), open(part, "a") as file:

        def keep(rollout: Rollout) -> None:
            seconds[rollout.seed] = time.perf_counter() - start
            row = {f: getattr(rollout, f) for f in fields} | {"seconds": seconds[rollout.seed]}
            file.write(json.dumps(row) + "\n")
            file.flush()
            rollout.logprobs, rollout.hold_bounds = [], []  # of no use here, and much to gather

        answers = answer_questions(
            engine, tokenizer, questions, how, engine.block_size, config.samples, config.prompt,
            config.seed, name.removeprefix("responses-"), known=known, done=keep,
        )  # fmt: skip
    for others in gather(seconds):
        seconds |= others
    if rank == 0:
        complete = out / f"{name}.jsonl.part"
        with writing(complete), open(complete, "w") as file:
            for i, (question, group) in enumerate(zip(questions, answers, strict=True)):
                for j, answer in enumerate(group):
                    row = {"index": i, "sample": j} | answer_record(question, answer)
                    row |= {"response_ids": answer.rollout.response_ids}
                    file.write(json.dumps(row | {"seconds": seconds[answer.rollout.seed]}) + "\n")
        complete.replace(out / f"{name}.jsonl")
        for part in out.glob(f"{glob.escape(name)}.rank*.jsonl"):
            part.unlink()
    figures = full_summary(answers) | {"seconds": max(seconds.values())}
    tokens = sum(a.rollout.num_tokens for group in answers for a in group)
    return figures | {"tokens_per_second": tokens / figures["seconds"]}


# -------------------------------------------------------------------------------- comparing two runs


def compare(first: Path, second: Path) -> str:
    """Accuracy of two finished runs on the same questions, Markdown, with a paired bootstrap.

    Raises:
        InputError: a run is not finished; no benchmark and rule in common, or its questions differ.
    """
    runs = []
    for folder in (first, second):
        if not (folder / "summary.json").exists():
            raise InputError(f"{folder}: no finished evaluation (no summary.json)")
        runs.append({f.stem.removeprefix("responses-"): f for f in folder.glob("responses-*.jsonl")})
    common = sorted(runs[0].keys() & runs[1].keys())
    if not common:
        raise InputError(f"{first} and {second} have no benchmark and decoding rule in common")
    rows = {}
    for name in common:
        a, b = (correct_by_question(run[name]) for run in runs)
        if a.keys() != b.keys():
            raise InputError(f"{runs[1][name]}: other questions than {runs[0][name]}")
        rows[name] = [fmean(a[q]) for q in a], [fmean(b[q]) for q in a]
    return report.comparison_table(str(first), str(second), rows)


def correct_by_question(file: Path) -> dict[tuple[int, str, str], list[bool]]:
    """Verdicts of the samples by (index, question, gold answer)."""
    correct: dict[tuple[int, str, str], list[bool]] = {}
    for where, row in read_rows(str(file)):
        try:
            correct.setdefault((row["index"], row["question"], row["gold"]), []).append(row["correct"])
        except KeyError as error:
            raise InputError(f"{where}: no {error} in this answer") from error
    return correct


# ----------------------------------------------------------------------------------------- the script


def check_config(config: EvalConfig) -> None:
    """Refuse values that make no sense, before anything is loaded."""
    if min(config.samples, config.max_tokens, config.max_batch, len(config.rules)) < 1:
        raise InputError("config keys samples, max_tokens, max_batch and rules: expected at least 1")
    for name in ("denoising_steps", "temperature"):
        if not getattr(config, name) > 0:
            raise InputError(f"config key {name}: expected more than 0")
    for name in ("limit", "top_k", "top_p", "threshold", "block_size", "min_tokens"):
        if not getattr(config, name) >= 0:
            raise InputError(f"config key {name}: expected 0 or more")
    if not all(threshold >= 0 for threshold in config.sweep):
        raise InputError(f"config key sweep: {config.sweep}, expected thresholds of 0 or more")
    if config.min_tokens > config.max_tokens:
        raise InputError(f"config key min_tokens: {config.min_tokens} is more than max_tokens")
    if len(config.compare) not in (0, 2):
        raise InputError(f"config key compare: expected two run folders, found {len(config.compare)}")


def read_benchmarks(data: Any, limit: int) -> dict[str, list[Question]]:
    """Questions by benchmark: by its name, or the file's without its ending.

    Raises:
        InputError: not a name or file, or a list of them; a benchmark that is not there yet.
    """
    benchmarks: dict[str, list[Question]] = {}
    for item in data if isinstance(data, list) and data else [data]:
        if not isinstance(item, str) or not item:
            raise InputError(f"config key data: {item}, expected files or names of benchmarks")
        path = Path("data/hub", f"{item}.jsonl") if item in BENCHMARKS else Path(item)
        if item in BENCHMARKS and not path.exists():
            raise InputError(f"config key data: no {path}: python data/download.py {item} fetches it")
        if path.stem in benchmarks:
            raise InputError(f"config key data: two files with the name {path.stem}")
        questions = read_questions(str(path))
        benchmarks[path.stem] = questions[: limit or len(questions)]
    return benchmarks


def decoding_rules(
    config: EvalConfig, tokenizer: PreTrainedTokenizerFast, diffusion: bool
) -> dict[str, Decoding]:
    """What is measured, by name: every rule, or dynamic at every threshold of a sweep instead.

    Raises:
        InputError: a banned token that is none, or a sweep with an autoregressive model.
    """
    vocabulary = tokenizer.get_vocab()
    for token in config.banned:
        if token not in vocabulary:
            raise InputError(f"config key banned: {token!r} is not a token of {config.model}")
    how = Decoding.from_config(config, banned_ids=[vocabulary[token] for token in config.banned])
    if not diffusion:
        if config.sweep:
            raise InputError(f"config key sweep: {config.model} is autoregressive and has no threshold")
        return {"autoregressive": how}
    replace = dataclasses.replace
    rules = {rule: replace(how, rule=rule) for rule in config.rules if rule != "dynamic" or not config.sweep}
    return rules | {f"dynamic-{t:g}": replace(how, rule="dynamic", threshold=t) for t in config.sweep}


def announce_demo(config: EvalConfig) -> None:
    """Say what is evaluated when nothing was asked for, or what to run first."""
    what = f"the demo's checkpoint {config.model} on {config.data}"
    if not Path(config.model).exists() or not Path(config.data).exists():
        raise InputError(f"without arguments {what} is evaluated, and it is not there: run `make demo` first")
    print(f"no arguments: evaluating {what} (--help lists the fields)")


def main(argv: list[str]) -> None:
    """Evaluate one checkpoint, or compare two runs."""
    config = load_config(EvalConfig, argv, PROTOCOLS)
    check_config(config)
    if config.compare:
        print(compare(*map(Path, config.compare)))
        return
    rank, _, _ = start_distributed("gloo")  # nothing large is exchanged, and it needs no GPU memory
    if not argv:
        announce_demo(config)
    benchmarks = read_benchmarks(config.data, config.limit)
    tokenizer, diffusion = load_tokenizer(config.model), is_block_diffusion(find_folder(config.model))
    rules, out = decoding_rules(config, tokenizer, diffusion), Path(config.out)
    claim_folder(out, config, benchmarks)
    log = out / f"engine-rank{rank}.log"
    engine = make_engine(config.model, tokenizer, config.block_size, config, log)
    results: Results = {rule: {} for rule in rules}
    for (rule, how), (name, questions) in product(rules.items(), benchmarks.items()):
        file = f"responses-{name}-{rule}"
        results[rule][name] = answer_and_keep(engine, tokenizer, questions, how, config, file)
    engine.close()
    if rank == 0:
        write_report(config, results)


def name_protocol(config: EvalConfig) -> str:
    """The protocol, and every field of it that was given another value: then it is not quite that one."""
    wanted = PROTOCOLS[config.protocol] | {"limit": 0}
    changed = [f"{n}={getattr(config, n)}" for n, value in wanted.items() if getattr(config, n) != value]
    return config.protocol + (f" but for {', '.join(changed)}" if changed else "")


def write_report(config: EvalConfig, results: Results) -> None:
    """Write summary.json, table.md and sweep.png, and print the table."""
    out, model = Path(config.out), config.model
    config.model = str(find_folder(config.model))
    means = {rule: report.average(list(figures.values())) for rule, figures in results.items()}
    rows = {f"{name}, {rule}": f for rule, figures in results.items() for name, f in figures.items()}
    several = len(rows) > len(means)
    tables = [table(rows | {f"mean, {rule}": f for rule, f in means.items()} if several else means)]
    if any(name in BENCHMARKS for figures in results.values() for name in figures):
        tables.append(report.published_table(model, name_protocol(config), results))
    text = "\n\n".join(tables) + "\n"
    with writing(out / "table.md"):
        (out / "table.md").write_text(text)
    if config.sweep:
        report.draw_sweep(out / "sweep.png", config.sweep, results)
    summary = {"config": dataclasses.asdict(config), **means, "benchmarks": results}
    write_json(out / "summary.json", summary)
    print(text)
    print(f"wrote {out}/summary.json, table.md and the responses beside them")


if __name__ == "__main__":
    run_script(main)
