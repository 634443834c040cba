"""Folders as the scripts leave them, made up, and what a report holds, read from its bytes."""

import base64
import json
import math
import random
import zlib
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean

from conftest import random_rollout

from plumbing.common import write_json
from reward import Graded, Question

# What a model may write to do harm: it would be seen as `hacked` in the page's window, or as an element.
HOSTILE = (
    "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=2'>"
    "<svg onload=window.hacked=3><!--<style>body{display:none}</style>]]>&lt;b&gt; {{DATA}} \\u003c ${1} `"
    "\u202eabc\u2066\u200f\u2028\x00\x1b[2J\ufeff\U000e0041 javascript:window.hacked=4 __proto__ \"'"
)


class Parts(HTMLParser):
    """The elements of a page, and the content of those with an id."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=False)
        self.tags, self.content, self.policy = [], {}, ""
        self._open = None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if tag in ("script", "style"):
            self._open = attributes.get("id", tag)
            self.content[self._open] = ""
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open:
            self.content[self._open] += data


def read_report(file: Path) -> tuple[dict, dict[str, dict]]:
    """(figures and rows, trajectories by key) of a report."""
    parts = Parts(file.read_text(encoding="utf-8"))
    samples = {}
    for name, content in parts.content.items():
        if name.startswith("t-"):
            samples[name[2:]] = json.loads(zlib.decompress(base64.b64decode(content)))
    return json.loads(parts.content["data"]), samples


def write_lines(file: Path, records: list[dict]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def record_of(
    seed: int, tokenizer=None, correct: bool | None = None, question: str = "", answer: str = "", **changes
) -> dict:
    """A graded rollout of random tokens as it stands on disk; of printable characters with a tokenizer."""
    rng = random.Random(seed)
    rollout = random_rollout(rng, 4)
    if tokenizer:
        words = "".join(rng.choice("abc123 =+\n\u20ac\U0001f600") for _ in rollout.response_ids)
        rollout.response_ids = tokenizer(words)["input_ids"][: len(rollout.response_ids)]
    correct = rng.random() < 0.5 if correct is None else correct
    rollout.finish_reason, rollout.seed = "stop" if correct or seed % 3 else "length", seed
    shown = answer or str(seed % 7)
    graded = Graded(rollout, Question(question or f"{seed}+1?", "7"), f"text {seed}", shown, correct, 4)
    return graded.to_record() | changes


def training_run(
    folder: Path, tokenizer_folder: Path, steps: int = 12, tokenizer=None, text: str = ""
) -> Path:
    """A run of dipo.py: skipped steps 3 (a loss) and 5 (the gap), too few groups at 7, resumed after 8.

    Args:
        text: stands in the question, the answer and the config of every rollout.
    """
    folder.mkdir(parents=True)
    starts = [
        {"step": at, "time": "2026-01-02T03:04:05+00:00", "command": f"dipo.py {text}"} for at in (0, 8)
    ]
    starts = [start | {"commit": "abc", "machine": "m", "defaults": {"steps": 100}} for start in starts]
    fields = {"steps": steps, "groups": 8, "max_rounds": 3, "dtype": "float32", "lr": 1e-3, "prompt": text}
    fields |= {"gap_limit": {"float32": 0.01, "bfloat16": 0.2}, "max_grad_norm": 1.0, "block_size": 0}
    model = {"name": "tiny", "folder": str(tokenizer_folder), "fingerprint": ""}
    run = {"script": "dipo", "model": model, "data": {}, "fields": fields, "forced": [], "starts": starts}
    write_json(folder / "run.json", run)
    metrics, rollouts = [], []
    for step in range(1, steps + 1):
        m = {"step": step, "reward": math.sin(step), "accuracy": step / (steps + 1), "lr": 1e-3 / step}
        m |= {
            "loss": None if step == 3 else 1 / step,
            "groups_kept": 6 if step == 7 else 9,
            "groups_asked": 9,
        }
        m |= {"gap_capped": 0.5 if step == 5 else 1e-6, "seconds/rollout": 1.5, "seconds/train": 0.5 + step}
        m |= {"rollout_tokens": 300, "tpf": 2.5, text or "other": 1.0}
        m |= {"eval/accuracy": step / 20} if step % 4 == 0 else {}
        m |= {"skipped": f"loss is nan {text}"} if step == 3 else {}
        m |= {"skipped": "engine and trainer are apart, gap_limit is 0.01"} if step == 5 else {}
        metrics.append(m)
        for i in (0, 1):
            seed = 10 * step + i
            record = record_of(seed, tokenizer, question=f"{seed}? {text}", answer=f"{seed % 7}{text}")
            rollouts.append(
                record | {"step": step, "rewards": {"accuracy": 1.0, text: 0.5}, "advantage": 0.25}
            )
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "rollouts.jsonl", rollouts)
    return folder


def evaluation(
    folder: Path, tokenizer_folder: Path, questions: int = 9, samples: int = 3, text: str = "",
    chance: str = "", name: str = "test", rules: tuple[str, ...] = ("static", "dynamic"), tokenizer=None,
) -> Path:  # fmt: skip
    """A finished evaluation; which samples are right is a matter of `chance`."""
    folder.mkdir(parents=True)
    results: dict = {}
    for rule in rules:
        records = []
        for q in range(questions):
            for s in range(samples):
                seed, right = 100 * q + s, random.Random(f"{chance} {q} {s}").random() < 0.5
                answer = ("7" if right else str(s % 2)) + text
                record = record_of(seed, tokenizer, right, f"question {q} {text}", answer)
                records.append({"index": q, "sample": s} | record | {"seconds": 1.0})
        write_lines(folder / f"responses-{name}-{rule}.jsonl", records)
        share = fmean(r["correct"] for r in records)
        of = {
            "questions": questions,
            "samples": samples,
            "accuracy": share,
            "pass_at_k": 1.0,
            "maj_at_k": 0.5,
        }
        of |= {"accuracy_low": share - 0.1, "accuracy_high": min(1.0, share + 0.1), "pass_at": {"1": share}}
        of |= {"tpf": fmean(r["tpf"] for r in records), "tokens": 12.0, "truncated": 0.1, "seconds": 3.0}
        results.setdefault(rule, {})[name] = of | {"tokens_per_second": 100.0}
    config = {"model": str(tokenizer_folder), "samples": samples, "prompt": "{question}" + text}
    start = {
        "step": 0,
        "time": "2026-01-02T03:04:05+00:00",
        "command": f"evaluate.py {text}",
        "commit": "abc",
    }
    start |= {"machine": "m", "defaults": {"samples": 1}}
    write_json(folder / "config.json", config | {"starts": [start]})
    write_json(folder / "summary.json", {"config": config, "benchmarks": results})
    return folder
