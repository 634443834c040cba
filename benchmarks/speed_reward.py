"""Does training move the accuracy / speed frontier out? One checkpoint, several ways on, the whole curve.

    python benchmarks/speed_reward.py      # about 40 minutes on two cores: two processes, one thread each

The task is data/tiny.py --ways: every answer can be written in many right ways, so that a low threshold mixes
them up (docs/speed.md). From one checkpoint in blocks of 8:

    accuracy                DiPO with the accuracy reward: the control
    settle                  SFT on its own careful right answers (data/own.py, configs/settle_sft.yaml)
    settle twice            the same again, with the answers that it then gives
    settle twice, accuracy  and then the control's DiPO: the recipe

with three seeds each, and with one: more SFT of as many steps; the ceiling, SFT on one way of writing from
the beginning; what `settle` lives from (wrong answers kept, sampled instead of greedy, decoded at threshold
0.3); and what was tried inside DiPO (a speed reward, with the NLL of right answers, dithered thresholds with
credit per block). Then start and settle in blocks of 16. Each is evaluated greedily on 1,000 held-out
questions at thresholds from 0.3 to 0.99; `derived` is the share of responses whose every step is right. (The
reward sees the box only, whose number can be read off the question.) Finished runs are kept, so that it can
be interrupted. `python benchmarks/compare.py` says which curve lies outside which.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import tiny  # noqa: E402

from plumbing.common import InputError, read_records, run_script, write_json  # noqa: E402
from plumbing.config import Parser, folder_name  # noqa: E402

THRESHOLDS = (0.3, 0.5, 0.7, 0.9, 0.99)
SPLITS = ["--careless", "0", "--min-terms", "4", "--max-terms", "4", "--max-term", "7", "--validation", "200"]
WAYS = {"ways": ["--ways", "0.45"], "one-way": ["--ways", "0"]}
START = ["steps=500", "batch_size=64", "lr=2e-3", "eval_every=0", "save_every=100"]
DIPO = [
    "groups=96", "group_size=6", "max_rounds=1", "steps=30", "lr=3e-5", "warmup_steps=3", "schedule=cosine",
    "max_tokens=56", "eval_every=0", "save_every=10", "likelihood=exact",
]  # fmt: skip
ACCURACY = [*DIPO, "threshold=0.9"]
SPEED = [*DIPO, "lr=1e-4", "normalize_each=true", "rewards={accuracy: 1.0, speed: 1.0}", "threshold=0.5"]
INSIDE = {  # what was tried inside DiPO
    "speed reward": SPEED,
    "speed reward, certainty": [*SPEED, "certainty=1.0", "certainty_at=noise"],
    "dither, credit per block": [*ACCURACY, "lr=1e-4", "dither=0.4", "speed_credit=0.25", "credit_per=block"],
}
OWN = {  # how the answers are made that `settle` trains on: arguments of evaluate.py, of data/own.py
    "settle": (["threshold=0.9"], []),
    "settle on wrong answers too": (["threshold=0.9"], ["--wrong-too"]),
    "settle on sampled answers": (["threshold=0.9", "top_k=0", "temperature=1.0"], []),
    "settle on hasty answers": (["threshold=0.3"], []),
}


class Campaign:
    """All runs in one folder; a run is done if its evaluation is."""

    def __init__(self, out: Path, steps: int | None, limit: int):
        self.out, self.limit = out, limit
        self.steps = [f"steps={steps}"] if steps else []  # for trying it

    def path(self, name: str) -> Path:
        """The folder of a run."""
        return self.out / name.replace(", ", "-").replace(" ", "-")

    def call(self, name: str, *command: str) -> None:
        """Run a script; what it prints goes to NAME/log.txt.

        Raises:
            InputError: it fails.
        """
        self.path(name).mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(self.path(name) / "log.txt", "a") as log:
            log.write(f"$ python {' '.join(command)}\n")
            log.flush()
            done = subprocess.run(
                [sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=log
            )
        if done.returncode:
            raise InputError(f"{name}: failed, see {self.path(name) / 'log.txt'}")

    def make_data(self) -> None:
        """Both variants of the task, and the training questions, each once."""
        for name, option in WAYS.items():
            if not (self.out / name / "questions.jsonl").exists():
                self.call("data", "data/tiny.py", "--out", str(self.out / name), *SPLITS, *option)
                known = {}
                for _, record in read_records(str(self.out / name / "rl.jsonl")):
                    known[record["question"]] = record
                lines = "".join(json.dumps(record) + "\n" for record in known.values())
                (self.out / name / "questions.jsonl").write_text(lines)

    def checkpoint(self, name: str) -> Path:
        """The newest checkpoint of a run."""
        return (self.path(name) / "run" / "latest").resolve()

    def train(self, name: str, config: str, data: Path, *fields: str) -> None:
        """Train, or go on training, as configs/CONFIG.yaml says, and evaluate the whole curve."""
        script = "dipo.py" if "dipo" in config else "sft.py"
        if not (self.path(name) / "sweep" / "summary.json").exists():
            run = ["--config", f"configs/{config}.yaml", f"out={self.path(name) / 'run'}", "resume=true"]
            self.call(name, script, *run, f"data={data}", *fields, *self.steps)
            self.evaluate(name)
        print(f"{name}: {self.curve(name)}", flush=True)

    def evaluate(self, name: str) -> None:
        """Greedy, dynamic, at every threshold."""
        sweep = f"sweep=[{','.join(map(str, THRESHOLDS))}]"
        self.call(
            name, "evaluate.py", f"model={self.checkpoint(name)}", f"data={self.out}/ways/test.jsonl",
            "rules=[dynamic]", sweep, "max_tokens=56", "max_batch=512", f"limit={self.limit}",
            f"out={self.path(name)}/sweep",
        )  # fmt: skip

    def curve(self, name: str) -> dict[str, dict[str, float]]:
        """Accuracy and derived in %, and TPF, by threshold."""
        folder = self.path(name) / "sweep"
        summary, points = json.loads((folder / "summary.json").read_text()), {}
        for t in THRESHOLDS:
            figures = summary[f"dynamic-{t:g}"]
            derived = []
            for _, record in read_records(str(folder / f"responses-test-dynamic-{t:g}.jsonl")):
                derived.append(record["correct"] and tiny.is_derived(record["question"], record["text"]))
            points[f"{t:g}"] = {
                "accuracy": round(100 * figures["accuracy"], 1),
                "derived": round(100 * sum(derived) / len(derived), 1),
                "tpf": round(figures["tpf"], 2),
            }
        return points

    def own_answers(self, kind: str, start: str) -> Path:
        """The training file of the start's own answers."""
        decoding, filtering = OWN[kind]
        folder = self.path(f"own {kind} of {start}")
        if not (folder / "own.jsonl").exists():
            responses = folder / "responses-questions-dynamic.jsonl"
            self.call(
                folder.name, "evaluate.py", f"model={self.checkpoint(start)}", "rules=[dynamic]",
                f"data={self.out}/ways/questions.jsonl", "max_tokens=56", "max_batch=512", f"out={folder}",
                *decoding,
            )  # fmt: skip
            self.call(folder.name, "data/own.py", str(responses), "--out", f"{folder}/own.jsonl", *filtering)
        return folder / "own.jsonl"

    # ------------------------------------------------------------------------------- the conditions

    def start(self, name: str, data: str, block_size: int) -> None:
        """A checkpoint from scratch."""
        self.train(name, "demo_sft", self.out / data / "sft.jsonl", *START, f"block_size={block_size}")

    def dipo(self, name: str, begin: str, *fields: str) -> None:
        """DiPO from a checkpoint."""
        self.train(name, "demo_dipo", self.out / "ways/rl.jsonl", f"model={self.checkpoint(begin)}", *fields)

    def settle(self, name: str, kind: str, seed: int, start: str = "start") -> None:
        """SFT on own answers of the start."""
        fields = [f"model={self.checkpoint(start)}", f"seed={seed}"]
        self.train(name, "settle_sft", self.own_answers(kind, start), *fields)

    def recipe(self, seed: int) -> None:
        """Settle twice, then DiPO."""
        self.settle(f"settle {seed}", "settle", seed)
        self.settle(f"settle twice {seed}", "settle", seed, f"settle {seed}")
        self.dipo(f"settle twice, accuracy {seed}", f"settle twice {seed}", *ACCURACY, f"seed={seed}")

    def more_sft(self) -> None:
        """Plain SFT, as `settle` does it."""
        model = f"model={self.checkpoint('start')}"
        self.train("more SFT", "settle_sft", self.out / "ways/sft.jsonl", model)

    def sixteen(self) -> None:
        """Start and settle in blocks of 16."""
        self.start("start 16", "ways", 16)
        self.settle("settle 16", "settle", 0, "start 16")

    def run(self, seeds: int, parallel: int) -> None:
        """Everything, the start first."""
        self.make_data()
        with ThreadPoolExecutor(parallel) as pool:
            finish([pool.submit(self.start, "start", "ways", 8)])
            self.own_answers("settle", "start")  # once, for all seeds
            work = []
            for seed in range(seeds):
                work.append(pool.submit(self.recipe, seed))
                work.append(pool.submit(self.dipo, f"accuracy {seed}", "start", *ACCURACY, f"seed={seed}"))
            work += [pool.submit(self.more_sft), pool.submit(self.sixteen)]
            work.append(pool.submit(self.start, "ceiling", "one-way", 8))
            for kind in OWN.keys() - {"settle"}:
                work.append(pool.submit(self.settle, kind, kind, 0))
            for name, fields in INSIDE.items():
                work.append(pool.submit(self.dipo, name, "start", *fields))
            finish(work)


def finish(work: list[Future]) -> None:
    """Wait for all; the first error ends it."""
    for future in work:
        future.result()


def main() -> None:
    """Run all conditions and print their curves."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=folder_name, default=ROOT / "runs/speed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--steps", type=int, help="of every training, to try it")
    parser.add_argument("--limit", type=int, default=1000, help="held-out questions")
    options = parser.parse_args()
    campaign = Campaign(options.out.absolute(), options.steps, options.limit)
    campaign.run(options.seeds, options.parallel)

    # Every curve in a table.
    names = [f.parent.parent.name for f in sorted(campaign.out.glob("*/sweep/summary.json"))]
    curves = {name: campaign.curve(name) for name in names}
    write_json(campaign.out / "summary.json", curves)
    print("\n| accuracy, derived (%), TPF at threshold | " + " | ".join(f"{t:g}" for t in THRESHOLDS) + " |")
    print("|---" * (len(THRESHOLDS) + 1) + "|")
    for name, points in curves.items():
        cells = [f"{p['accuracy']}, {p['derived']}, {p['tpf']}" for p in points.values()]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    run_script(main)
