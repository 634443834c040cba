r"""Evaluation: a checkpoint responds to the questions of benchmarks, and every response is graded.

For each decoding rule (static, dynamic) every question gets `samples` responses. Reported: accuracy
(mean@k, with a 95 % interval by bootstrap over the questions), pass@k, maj@k, tokens per forward, mean
length of what the user sees, truncated responses (always wrong), and tokens per second. The same weights
get very different accuracies under another protocol (SDAR-8B-Chat on MATH500: published as 52.6, 71.9
and 78.6). A protocol therefore has a name, and all its settings go into summary.json beside the figures.

    python evaluate.py                                                # the demo's checkpoint
    python evaluate.py model=JetLM/SDAR-8B-Chat protocol=dirl data=[math500,aime24]
    torchrun --nproc_per_node 8 evaluate.py --config configs/eval.yaml data=olympiadbench
    python evaluate.py sweep=[0.5,0.7,0.9,0.99] samples=4             # thresholds: sweep.png, AUP

Every response is written to disk as it ends: the same command goes on where it was interrupted, and under
torchrun every rank makes its share (one file system is assumed). Two runs are compared by
benchmarks/compare.py. Left out on purpose: prompts with worked examples, graders other than reward.py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from plumbing.common import InputError, check_model, run_script
from plumbing.config import EngineName, Rule, check_file, read_arguments, setting
from plumbing.figures import BENCHMARKS

BOXED = "{question}\nPlease reason step by step, and put your final answer within $\\boxed{}$."
# What a protocol sets; the config file and key=value win over it.
PROTOCOLS: dict[str, dict[str, Any]] = {
    "none": {},
    "greedy": {"prompt": BOXED, "top_k": 1, "max_tokens": 8192},  # ours: nothing is left to chance
    "dirl": {  # DiRL: [paper] arXiv 2512.22234, Table 1; [release] evaluation of github OpenMOSS/DiRL
        "prompt": BOXED,  # [release]
        "samples": 16,  # per question [release]
        "temperature": 1.0,  # [release]
        "top_k": 50,  # [release]
        "top_p": 1.0,  # [release]
        "threshold": 0.9,  # of "dynamic" [paper]
        "denoising_steps": 4,  # "static": with blocks of 4 one token per forward [paper]
        "max_tokens": 8192,  # [paper]
        "min_tokens": 128,  # [release]
        "banned": ["<|endoftext|>"],  # so that responses stop at <|im_end|> [release]
        "dtype": "bfloat16",  # [release]
    },
}


@dataclass
class EvalConfig:
    """Fields of evaluate.py."""

    model: str = setting("runs/demo/dipo/latest", "checkpoint folder or hub id", heading="What is evaluated")
    data: Any = setting(
        "runs/demo/data/test.jsonl", "question file or name of a benchmark, or a list of them"
    )
    out: str = setting("runs/eval", "responses, summary.json and table.md go here")
    protocol: Literal["none", "greedy", "dirl"] = setting("none", "sets other fields: evaluate.PROTOCOLS")
    rules: list[Rule] = setting(["static", "dynamic"], "decoding rules")
    samples: int = setting(1, "responses per question (k)", above=0)
    sweep: list[float] = setting([], "dynamic at each of these thresholds instead; see sweep.png", at_most=1)
    limit: int = setting(0, "only the first so many questions of each file; 0: all")

    prompt: str = setting(
        "{question}", "the user's turn; {question} is replaced", heading="Decoding", holds="{question}"
    )
    threshold: float = setting(0.9, "dynamic: confidence that is enough to reveal", at_most=1)
    denoising_steps: int = setting(4, "static, sequential: steps per block", above=0)
    temperature: float = setting(1.0, "of the softmax that tokens and confidences come from", above=0)
    top_k: int = setting(1, "1: greedy; 0: off")
    top_p: float = setting(1.0, "nucleus; 1: off", above=0, at_most=1)
    max_tokens: int = setting(256, "new tokens per response", above=0)
    min_tokens: int = setting(0, "no stop token is drawn in a block that begins before so many new tokens")
    banned: list[str] = setting([], "tokens that are never drawn")
    block_size: int = setting(0, "tokens per block; 0: config.json's, else by name, else 4")
    seed: int = setting(0, "of the sampling", at_least=None)

    engine: EngineName = setting("auto", "lmdeploy where it can run, else torch", heading="Rollout engine")
    max_batch: int = setting(256, "responses generated at once", above=0)
    dtype: Literal["float32", "bfloat16"] = setting("float32", "of the weights; lmdeploy has bfloat16")
    cache_gib: float = setting(0.0, "lmdeploy's key/value cache; 0: what its weights leave")

    def check(self) -> None:
        """Check combinations of fields, before anything is loaded.

        Raises:
            InputError: naming the field.
        """
        if not self.rules:
            raise InputError("config key rules: expected at least 1")
        if self.min_tokens > self.max_tokens:
            raise InputError(f"config key min_tokens: {self.min_tokens} is more than max_tokens")
        if self == EvalConfig() and not (Path(self.model).exists() and Path(self.data).exists()):
            what = f"the demo's checkpoint {self.model} on {self.data}"
            raise InputError(f"without arguments {what} is evaluated; it is not there: run `make demo` first")
        benchmark_files(self.data)
        check_model(self.model)


def benchmark_files(data: Any) -> dict[str, Path]:
    """Question files, by the name of the benchmark or of the file without its ending.

    Raises:
        InputError: not a name or file, or a list of them; a file that is not there.
    """
    files: dict[str, Path] = {}
    items = data if isinstance(data, list) and data else [data]
    for item in items:
        if not isinstance(item, str) or not item:
            raise InputError(f"config key data: {item}, expected files or names of benchmarks")
        path = Path("data/hub", f"{item}.jsonl") if item in BENCHMARKS else Path(item)
        if item in BENCHMARKS and not path.exists():
            raise InputError(f"config key data: no {path}: python data/download.py {item} fetches it")
        check_file(str(path))
        if path.stem in files:
            raise InputError(f"config key data: two files with the name {path.stem}")
        files[path.stem] = path
    return files


if __name__ == "__main__":  # a bad argument is answered before the imports below, which take seconds
    CONFIG = read_arguments(EvalConfig, PROTOCOLS)

import dataclasses
import glob
import hashlib
import json
import os
import time
from array import array
from statistics import fmean
from typing import TYPE_CHECKING

from plumbing.checkpoint import encode_prompt, find_folder, is_block_diffusion, load_tokenizer
from plumbing.common import decisions, printable, progress, read_records, write_json, writing
from plumbing.figures import Results, bootstrap_interval, majority, pass_at_k, plot_sweep, tables
from plumbing.kept import check_response
from plumbing.lengths import fitting_questions
from plumbing.ranks import gather, rank_and_world, start_distributed
from plumbing.report import try_to_write
from plumbing.run_folder import claim
from reward import Graded, Question, grade, read_questions
from rollout import Decoding, Engine, Rollout, generate_all, make_engine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch
    from transformers import PreTrainedTokenizerFast

    from plumbing.config import TrainConfig


# -------------------------------------------------------------------------------- responding


def respond(
    engine: Engine,
    tokenizer: PreTrainedTokenizerFast,
    questions: list[Question],
    how: Decoding,
    samples: int = 1,
    prompt: str = "{question}",
    seed: int = 0,
    title: str = "responses",
    weights: Callable[[], Iterable[tuple[str, torch.Tensor]]] | None = None,
    known: Mapping[int, Rollout] | None = None,
    done: Callable[[Rollout], None] = lambda rollout: None,
) -> list[list[Graded]]:
    """`samples` graded rollouts of each question; call it on every rank, each makes its share.

    Args:
        prompt: the user's turn; {question} is replaced.
        seed: sample j of question i has seed + i * samples + j.
        weights: see `rollout.generate_all`; needed if the engine's are not the checkpoint's.
        known: rollouts that are there already, by seed, perhaps without their prompts.
        done: sees each new rollout as it ends.
    """
    # This rank's share of the questions, and which of its rollouts are missing.
    rank, world = rank_and_world()
    rollouts: dict[int, Rollout] = {}  # by seed
    asked, prompts, seeds = [], [], []  # for every rollout; for the missing ones
    for i in range(rank, len(questions), world):
        ids = encode_prompt(tokenizer, prompt.replace("{question}", questions[i].text))
        for sample_seed in range(seed + i * samples, seed + (i + 1) * samples):
            asked.append((questions[i], sample_seed))
            if known and sample_seed in known:
                rollouts[sample_seed] = dataclasses.replace(known[sample_seed], prompt_ids=ids)
            else:
                prompts.append(ids)
                seeds.append(sample_seed)

    # Generate those.
    bar = progress(initial=len(rollouts), total=len(asked), desc=title, unit="response", disable=rank > 0)

    def ended(rollout: Rollout) -> None:
        bar.update()
        done(rollout)

    with bar:
        new = generate_all(engine, prompts, seeds, how, ended, weights)
    rollouts.update(zip(seeds, new, strict=True))

    # Grade all of them, in the order of the questions.
    in_order = [rollouts[sample_seed] for _, sample_seed in asked]
    asked_questions = [question for question, _ in asked]
    graded = grade(in_order, asked_questions, tokenizer, engine.block_size, how.max_tokens)
    by_question = [graded[n : n + samples] for n in range(0, len(graded), samples)]

    # Bring the ranks' shares together: of 2 ranks the first has questions 0 2 4, the second 1 3 5.
    shares = gather(by_question)
    return [shares[i % world][i // world] for i in range(len(questions))]


def evaluate_now(
    engine: Engine,
    tokenizer: PreTrainedTokenizerFast,
    questions: list[Question],
    config: TrainConfig,
    weights: Callable[[], Iterable[tuple[str, torch.Tensor]]],
) -> dict[str, float]:
    """Evaluate while training, dynamic and greedily: `summarize`'s figures, names prefixed with eval/."""
    how = Decoding(top_k=1, threshold=config.eval_threshold, max_tokens=config.eval_max_tokens)
    start = time.perf_counter()
    graded = respond(
        engine, tokenizer, questions, how, prompt=config.prompt, title="evaluate", weights=weights
    )
    figures = summarize(graded) | {"seconds": time.perf_counter() - start}
    return {f"eval/{name}": value for name, value in figures.items()}


# --------------------------------------------------------------------------------- figures


def summarize(graded: list[list[Graded]]) -> dict[str, float]:
    """Figures over questions x samples; tokens: what the user sees, per response."""
    flat = [g for group in graded for g in group]
    return {
        "questions": len(graded),
        "samples": len(flat) // len(graded),
        "accuracy": sum(g.correct for g in flat) / len(flat),
        "pass_at_k": sum(any(g.correct for g in group) for group in graded) / len(graded),
        "tpf": sum(len(g.rollout.response_ids) for g in flat) / sum(g.rollout.num_steps for g in flat),
        "tokens": sum(g.rollout.num_tokens for g in flat) / len(flat),
        "truncated": sum(g.truncated for g in flat) / len(flat),
    }


def full_summary(graded: list[list[Graded]]) -> dict[str, Any]:
    """`summarize`, and interval, pass@j and maj@k."""
    correct = [[g.correct for g in group] for group in graded]
    k = len(correct[0])
    low, high = bootstrap_interval([fmean(of_question) for of_question in correct])
    pass_at = {}
    for j in [2**i for i in range(k.bit_length()) if 2**i < k] + [k]:  # k = 6: 1 2 4 6
        pass_at[str(j)] = fmean(pass_at_k(k, sum(of_question), j) for of_question in correct)
    return summarize(graded) | {
        "accuracy_low": low,
        "accuracy_high": high,
        "pass_at": pass_at,
        "maj_at_k": fmean(majority_is_right(group) for group in graded),
    }


def majority_is_right(group: list[Graded]) -> bool:
    """maj@k of one question. Truncated samples have no vote: they are wrong whatever their box says."""
    first = majority([None if g.truncated else g.answer for g in group])  # an index
    return first is not None and group[first].correct


# -------------------------------------------------------------------- responses kept on disk

Benchmarks = dict[str, list[Question]]  # by name
KEPT = ("response_ids", "steps", "num_tokens", "finish_reason", "seed")  # of a rollout


def claim_folder(out: Path, model: Path, config: EvalConfig, benchmarks: Benchmarks) -> IO[str] | None:
    """Lock out, and write to out/config.json all settings that decide the responses.

    Raises:
        InputError: out holds responses of other settings. (Those of the same ones are gone on with.)
    """
    # The config, the weights, and the questions.
    irrelevant = ("out", "max_batch", "cache_gib")
    run = {name: value for name, value in dataclasses.asdict(config).items() if name not in irrelevant}
    run["model"] = str(model)
    files = sorted(model.glob("model*.safetensors"))
    run["weights"] = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    run["questions"] = {}
    for name, questions in benchmarks.items():
        text = json.dumps([(q.text, q.gold, q.tolerance) for q in questions])
        run["questions"][name] = hashlib.sha256(text.encode()).hexdigest()

    in_use = any(f.stat().st_size for f in out.glob("responses-*.jsonl"))
    return claim(out, run, in_use, config)


def read_kept(out: Path, name: str) -> dict[int, dict[str, Any]]:
    """Responses by seed: NAME.jsonl of a complete run, NAME.rank*.jsonl of an interrupted one.

    Raises:
        InputError: a line that is no response.
    """
    kept = {}
    for file in (out / f"{name}.jsonl", *out.glob(f"{glob.escape(name)}.rank*.jsonl")):
        if not file.exists():
            continue
        try:
            records = read_records(file, interrupted=True)
        except InputError as error:
            raise InputError(f"{error}; remove {out} to start again") from error
        for where, record in records:
            check_response(record, where, out)
            kept[record["seed"]] = record
    return kept


def respond_and_keep(
    engine: Engine,
    tokenizer: PreTrainedTokenizerFast,
    questions: list[Question],
    how: Decoding,
    config: EvalConfig,
    name: str,
) -> dict[str, Any]:
    """Respond where no response is on disk yet, and keep each as it ends.

    While it runs, rank r appends to NAME.rankR.jsonl; in the end rank 0 writes NAME.jsonl, in order. The
    `seconds` of a response are the time that the run has worked until it ended; a pause does not count.

    Returns:
        The figures of all responses.
    """
    # The rollouts of an interrupted run, and its clock.
    out, rank = Path(config.out), rank_and_world()[0]
    kept = read_kept(out, name)
    known = {}
    for seed, record in kept.items():
        fields = {field: record[field] for field in KEPT}
        known[seed] = Rollout(prompt_ids=[], logprobs=array("f", record.get("logprobs", [])), **fields)
    seconds = {seed: record["seconds"] for seed, record in kept.items()}
    start = time.perf_counter() - max(seconds.values(), default=0.0)

    # Make the rest, behind the last complete line of this rank's file.
    part = out / f"{name}.rank{rank}.jsonl"
    if part.exists():
        os.truncate(part, part.read_bytes().rfind(b"\n") + 1)
    with writing(part), open(part, "a") as file:

        def keep(rollout: Rollout) -> None:
            seconds[rollout.seed] = time.perf_counter() - start
            rollout.logprobs = array("f", rollout.logprobs)  # an eighth of a list of numbers
            record = {field: getattr(rollout, field) for field in KEPT} | decisions(rollout.logprobs)
            file.write(json.dumps(record | {"seconds": seconds[rollout.seed]}) + "\n")
            file.flush()

        graded = respond(
            engine, tokenizer, questions, how, config.samples, config.prompt, config.seed,
            title=name.removeprefix("responses-"), known=known, done=keep,
        )  # fmt: skip

    # Merge the files of the ranks.
    for others in gather(seconds):
        seconds |= others
    if rank == 0:
        write_responses(out, name, graded, seconds)
    figures = full_summary(graded) | {"seconds": max(seconds.values())}
    tokens = sum(g.rollout.num_tokens for group in graded for g in group)
    return figures | {"tokens_per_second": tokens / figures["seconds"]}


def write_responses(out: Path, name: str, graded: list[list[Graded]], seconds: dict[int, float]) -> None:
    """Write NAME.jsonl with all responses, in place of the files of the ranks."""
    complete = out / f"{name}.jsonl.part"
    with writing(complete), open(complete, "w") as file:
        for index, group in enumerate(graded):
            for sample, g in enumerate(group):
                record = {"index": index, "sample": sample} | g.to_record()
                file.write(json.dumps(record | {"seconds": seconds[g.rollout.seed]}) + "\n")
    complete.replace(out / f"{name}.jsonl")
    for part in out.glob(f"{glob.escape(name)}.rank*.jsonl"):
        part.unlink()


# ------------------------------------------------------------------------------ the script


def decodings(config: EvalConfig, tokenizer: PreTrainedTokenizerFast, diffusion: bool) -> dict[str, Decoding]:
    """What is measured, by name: every rule; with a sweep, dynamic once per threshold in its place.

    Raises:
        InputError: a banned token that is not in the vocabulary; a sweep of an autoregressive model.
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
    named = {}
    for rule in config.rules:
        if rule != "dynamic" or not config.sweep:
            named[rule] = dataclasses.replace(how, rule=rule)
    for threshold in config.sweep:
        named[f"dynamic-{threshold:g}"] = dataclasses.replace(how, rule="dynamic", threshold=threshold)
    return named


def main(config: EvalConfig) -> None:
    """Evaluate one checkpoint."""
    rank, _, _ = start_distributed("gloo")  # nothing large is exchanged, and it needs no GPU memory
    if config == EvalConfig() and rank == 0:
        print(f"no arguments: evaluating the demo's checkpoint {config.model} on {config.data}")

    # What is asked, of whom, and how.
    benchmarks = {}
    for name, path in benchmark_files(config.data).items():
        benchmarks[name] = read_questions(str(path))[: config.limit or None]
    folder, out = find_folder(config.model).resolve(), Path(config.out)  # once: `latest` may move on
    tokenizer = load_tokenizer(folder)
    named = decodings(config, tokenizer, is_block_diffusion(folder))
    lock = claim_folder(out, folder, config, benchmarks)
    engine = make_engine(folder, tokenizer, config.block_size, config, out / f"engine-rank{rank}.log")
    for name, questions in benchmarks.items():
        benchmarks[name] = fitting_questions(questions, tokenizer, engine, config, config.max_tokens)

    # Every benchmark under every decoding.
    results: Results = {label: {} for label in named}
    for label, how in named.items():
        for name, questions in benchmarks.items():
            file = f"responses-{name}-{label}"
            results[label][name] = respond_and_keep(engine, tokenizer, questions, how, config, file)
    engine.close()
    if rank == 0:
        write_report(config, results)
        try_to_write([out])
        lock.close()


def name_protocol(config: EvalConfig) -> str:
    """The name of the protocol, with the fields that were given another value than its own."""
    wanted = PROTOCOLS[config.protocol] | {"limit": 0}  # no protocol leaves questions out
    changed = [f"{n}={getattr(config, n)}" for n, value in wanted.items() if getattr(config, n) != value]
    return config.protocol + (f" except for {', '.join(changed)}" if changed else "")


def write_report(config: EvalConfig, results: Results) -> None:
    """Write summary.json, table.md and sweep.png, and print the table."""
    out = Path(config.out)
    text, figures = tables(config.model, name_protocol(config), results)
    with writing(out / "table.md"):
        (out / "table.md").write_text(text)
    if config.sweep:
        plot_sweep(out / "sweep.png", config.sweep, results)
    settings = dataclasses.asdict(config) | {"model": str(find_folder(config.model))}
    write_json(out / "summary.json", {"config": settings, **figures, "benchmarks": results})
    print(text)
    print(f"wrote {printable(str(out))}/summary.json, table.md and the responses beside them")


if __name__ == "__main__":
    run_script(main, CONFIG)
