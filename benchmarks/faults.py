"""A fault campaign: chains of SFT, DiPO and evaluation that are killed, starved and poisoned all the way.

Every start of a stage but the last gets a fault at a random moment; then the same command is given again,
with `resume=true`. In the end weights, optimizer states, metrics, rollouts and responses must be those of a
chain that nothing happened to, bit for bit:

    sigkill, sigterm, sigint    to the process; with two ranks to both
    killed rank                 SIGKILL to one of two ranks
    full disk                   no file may grow beyond a random size
    failing saves               a checkpoint's files cannot be written, a few times or for good
    nan in the engine           a weight of the rollout engine becomes nan
    engine killed, stopped, garbled     LMDeploy's subprocess (where LMDeploy is installed; on the CPU)

A number that is none in a *gradient* or a *reward* makes the run skip a step, which changes what follows.
Such a chain is therefore compared with one that skips the same steps and suffers nothing else.

    python benchmarks/faults.py --minutes 20        # prints a table; exit code 1 if any chain differs

Tiny models on the CPU; processes are forks of one with the imports done, so that a start takes 0.2 s.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import resource
import runpy
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "data")]

STAGES = ("sft", "dipo", "evaluate")
SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
SFT = ["steps=8", "save_every=2", "batch_size=16", "views=2", "lr=1e-3", "seed=3"]
DIPO = ["steps=5", "save_every=1", "groups=4", "group_size=4", "max_rounds=2", "max_tokens=16", "lr=1e-3"]
DIPO += ["threshold=0.005", "rewards={accuracy: 1.0, speed: 1.0}", "kl_beta=0.1", "seed=3"]
EVALUATE = ["max_tokens=24", "samples=2", "threshold=0.005"]
NAN_STEP = {"sft": 3, "dipo": 2}  # of a poisoned gradient
NAN_QUESTION = 5  # running number of the question with a poisoned reward
PATIENCE = 120.0  # seconds after which a process that should have ended is a failure


@dataclass(frozen=True)
class Kind:
    """What decides the result of a chain, hence with which undisturbed one it is compared."""

    ranks: int = 1
    engine: str = "torch"
    poison: str = ""  # "gradient" or "reward": a step is skipped

    def __str__(self) -> str:
        parts = [f"{self.ranks} rank{'s' * (self.ranks > 1)}", self.engine]
        return ", ".join(parts + [f"nan in a {self.poison}"] * bool(self.poison))


KINDS = [
    Kind(engine="lmdeploy"), Kind(), Kind(), Kind(poison="gradient"), Kind(poison="reward"), Kind(ranks=2),
    Kind(ranks=2, poison="gradient"), Kind(engine="lmdeploy"),
]  # fmt: skip


# ------------------------------------------------------------ inside a stage: faults that are injected


def run_stage(argv: list[str]) -> None:
    """`--stage NAME ZYGOTE key=value ...`: run the script with what the variable FAULT says."""
    stage, zygote, *arguments = argv
    fault = json.loads(os.environ["FAULT"])
    from plumbing.run_folder import RunFolder

    RunFolder.retry_seconds = 0.05
    if int(zygote) >= 0:
        use_lmdeploy(int(zygote), fault)
    if "gradient" in fault:
        poison_gradient(fault["gradient"], NAN_STEP.get(stage, 0))
    if "reward" in fault:
        poison_reward()
    if "nan in the engine" in fault:
        poison_engine(fault["nan in the engine"])
    if "failing saves" in fault:
        fail_saves(fault["failing saves"])
    sys.argv = [f"{stage}.py", *arguments]
    runpy.run_path(str(ROOT / f"{stage}.py"), run_name="__main__")


def poison_gradient(rank: int, step: int) -> None:
    """One value of the gradient on one rank is nan at that step, also if the step is done again."""
    import torch

    from plumbing.checkpoint import own_slice
    from plumbing.run_folder import RunFolder

    clip, restore, done = torch.nn.utils.clip_grad_norm_, RunFolder.restore, [0]

    def restore_and_count(self, *arguments) -> None:
        restore(self, *arguments)
        done[0] = self.step

    def poison_and_clip(parameters, *arguments):
        parameters = list(parameters)
        done[0] += 1
        if done[0] == step and rank == int(os.environ.get("RANK", 0)):
            own_slice(parameters[-1].grad)[0].view(-1)[:1] = torch.nan
        return clip(parameters, *arguments)

    RunFolder.restore, torch.nn.utils.clip_grad_norm_ = restore_and_count, poison_and_clip


def poison_reward() -> None:
    """The rewards of one question are nan, whenever it is asked."""
    import reward

    accuracy = reward.accuracy

    def poisoned(graded) -> float:
        number = graded.rollout.seed % 2**40 // 4  # of the question: groups of 4
        return float("nan") if number == NAN_QUESTION else accuracy(graded)

    reward.REWARDS["accuracy"] = poisoned


def poison_engine(call: int) -> None:
    """A weight of the embedded engine is nan from its so-many-th call on, until it gets weights again."""
    import torch

    import rollout

    generate, calls = rollout.TorchEngine.generate, [0]

    def poisoned(self, *arguments):
        calls[0] += 1
        if calls[0] == call:
            self.model.lm_head.weight.data[0, 0] = torch.nan
        return generate(self, *arguments)

    rollout.TorchEngine.generate = poisoned


def fail_saves(times: int) -> None:
    """The first so many files of weights or states that belong into a checkpoint cannot be written."""
    from plumbing import checkpoint

    save_file, failed = checkpoint.save_file, [0]

    def failing(tensors, file, *arguments):
        if "rescued" not in str(file) and failed[0] < times:
            failed[0] += 1
            raise OSError(28, "No space left on device", str(file))
        save_file(tensors, file, *arguments)

    checkpoint.save_file = failing


def use_lmdeploy(zygote: int, fault: dict[str, Any]) -> None:
    """LMDeploy on the CPU, forked off a process with its imports done, and what befalls it."""
    import socket
    import threading

    from zygote import Zygote

    import rollout

    forks = Zygote.__new__(Zygote)
    forks._socket = socket.socket(fileno=zygote)
    engine = rollout.LMDeployEngine
    engine.setup, engine.launch = "benchmarks.faults:install_child", staticmethod(forks.popen)
    engine.silence_seconds, engine.start_seconds = 3, 30
    start = engine._start

    def strike(pid: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it was faster
            os.kill(pid, number)

    def start_and_strike(self) -> None:
        start(self)
        for name, number in (("engine killed", signal.SIGKILL), ("engine stopped", signal.SIGSTOP)):
            if name in fault:
                threading.Timer(fault.pop(name), strike, (self._process.pid, number)).start()

    engine._start = start_and_strike


def install_child() -> None:
    """In LMDeploy's subprocess: run on the CPU; once, send garbage in place of a message."""
    from multiprocessing.connection import Connection

    import lmdeploy_on_cpu

    lmdeploy_on_cpu.install()
    marker = Path(os.environ.get("GARBLE", "/nowhere/at-all"))
    if not marker.exists():
        return
    countdown, send = [int(marker.read_text())], Connection.send
    marker.unlink()

    def garbled(self, message) -> None:
        countdown[0] -= 1
        if countdown[0] == 0:
            os.write(self.fileno(), random.Random(0).randbytes(200))
        else:
            send(self, message)

    Connection.send = garbled


# --------------------------------------------------------------------------------- one start of a stage


@dataclass
class Campaign:
    """What all chains share."""

    out: Path
    rng: random.Random
    zygote: Any
    engines: Any  # the zygote of LMDeploy's subprocesses, or None
    references: dict[Kind, Path] = field(default_factory=dict)
    seconds: dict[tuple[Kind, str], float] = field(default_factory=dict)  # of an undisturbed stage
    injected: Counter = field(default_factory=Counter)
    ended: Counter = field(default_factory=Counter)

    def arguments(self, kind: Kind, chain: Path, stage: str) -> list[str]:
        """The command of a stage: one and the same at every start."""
        given = {"sft": SFT, "dipo": [*DIPO, f"engine={kind.engine}"], "evaluate": EVALUATE}[stage]
        model = {"sft": self.out / "model", "dipo": chain / "sft/latest", "evaluate": chain / "dipo/latest"}
        data = {"sft": "sft.jsonl", "dipo": "rl.jsonl", "evaluate": "test.jsonl"}[stage]
        paths = [f"model={model[stage]}", f"data={self.out}/{data}", f"out={chain}/{stage}"]
        return paths + given + (["resume=true"] if stage != "evaluate" else [])

    def start(self, kind: Kind, chain: Path, stage: str, fault: dict[str, Any], limit: int = 0) -> list:
        """Start the ranks of a stage; what they print goes to the end of CHAIN/STAGE.log."""
        lmdeploy = kind.engine == "lmdeploy" and stage == "dipo"
        fd = self.engines._socket.fileno() if lmdeploy else -1
        command = [sys.executable, str(ROOT / "benchmarks/faults.py"), "--stage", stage, str(fd)]
        here = {"FAULT": json.dumps(fault), "HOME": str(chain), "TMPDIR": str(chain), "PWD": str(chain)}
        here |= {"OMP_NUM_THREADS": "1"}
        here |= {"CUDA_VISIBLE_DEVICES": "", "GARBLE": str(chain / "garble")}
        environments = [os.environ | here]
        if kind.ranks > 1:
            environments = self._ranks(kind.ranks, os.environ | here)
        forks = []
        with open(chain / f"{stage}.log", "ab") as log:
            for environment in environments:
                fork = self.zygote.popen(
                    command + self.arguments(kind, chain, stage), cwd=chain, env=environment, stdout=log,
                    stderr=log, pass_fds=[fd] if lmdeploy else [],
                    limits=[(resource.RLIMIT_FSIZE, limit)] if limit else [],
                )  # fmt: skip
                forks.append(fork)
        return forks

    def _ranks(self, ranks: int, shared: dict[str, str]) -> list[dict[str, str]]:
        """As torchrun gives them; this process is the rendezvous."""
        from torch.distributed import TCPStore

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = shared | {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port)}
        shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        return [shared | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(ranks)]


def wait(forks: list, seconds: float) -> bool:
    """Wait so long for all to end; the first one that fails has the others ended, as torchrun does."""
    end, told = time.monotonic() + seconds, False
    while any([fork.poll() is None for fork in forks]):
        if time.monotonic() > end:
            return False
        if any(fork.returncode for fork in forks) and not told:
            told = True
            send(forks, signal.SIGTERM)
        time.sleep(0.005)
    return True


def send(forks: list, number: int) -> None:
    """A signal to all that still run."""
    for fork in forks:
        with contextlib.suppress(ProcessLookupError):  # it may end at this moment
            if fork.poll() is None:
                os.kill(fork.pid, number)


# ------------------------------------------------------------------------------------------- a chain


def possible_faults(kind: Kind, stage: str) -> list[str]:
    """Faults that a start of a stage can get."""
    faults = ["sigkill", "sigterm", "sigint", "full disk"]
    if kind.ranks > 1:
        faults.append("killed rank")
    if stage != "evaluate":
        faults.append("failing saves")
    if stage == "dipo" and kind.engine == "torch":
        faults.append("nan in the engine")
    if stage == "dipo" and kind.engine == "lmdeploy":
        faults += ["engine killed", "engine stopped", "engine garbled"] * 2
    return faults


def strike(c: Campaign, kind: Kind, chain: Path, stage: str, name: str, poison: dict) -> str:
    """Start a stage, let one fault happen to it, and wait for its end; what is wrong with that, or ""."""
    # Faults that are decided before the start.
    seconds, rng = c.seconds[kind, stage], c.rng
    moment = rng.uniform(0, seconds)
    fault, limit = dict(poison), 0
    if name == "nan in the engine":
        fault[name] = rng.randint(1, 8)
    elif name == "failing saves":
        fault[name] = rng.choice([1, 2, 3, 10**6])
    elif name in ("engine killed", "engine stopped"):
        fault[name] = moment
    elif name == "engine garbled":
        (chain / "garble").write_text(str(rng.randint(2, 60)))
    elif name == "full disk":
        limit = rng.randint(200, 200_000)
    forks = c.start(kind, chain, stage, fault, limit)

    # Faults at a moment of the run. What ended before them did not get them.
    came = True
    if name.startswith("sig") or name == "killed rank":
        wait(forks, max(moment, 0.5))  # what reads the arguments listens to signals by then
        victims = [rng.choice(forks)] if name == "killed rank" else forks
        came = any(fork.poll() is None for fork in victims)
        number = {"sigterm": signal.SIGTERM, "sigint": signal.SIGINT}.get(name, signal.SIGKILL)
        send(victims, number)
    if not wait(forks, PATIENCE):
        send(forks, signal.SIGKILL)
        return f"{stage}, {name}: still running after {PATIENCE:.0f} s"
    c.injected[name] += came

    # How it may end.
    codes = {fork.returncode for fork in forks}
    allowed = {"sigkill": {-9}, "sigterm": {143}, "sigint": {130, 143}, "killed rank": {-9, 2, 143}}.get(
        name, {0}
    )
    if name in ("full disk", "failing saves"):
        allowed = {0, 2, 143}
    if not codes <= allowed | {0}:
        return f"{stage}, {name}: exit codes {codes}"
    return ""


def run_chain(c: Campaign, kind: Kind, chain: Path, faults: bool) -> list[str]:
    """Run the stages of a chain; what went wrong."""
    chain.mkdir(parents=True)
    problems = []
    poison = {kind.poison: kind.ranks - 1} if kind.poison else {}
    for stage in STAGES:
        # Some starts with a fault, then one without.
        for _ in range(c.rng.randint(1, 3) if faults else 0):
            name = c.rng.choice(possible_faults(kind, stage))
            problems += filter(None, [strike(c, kind, chain, stage, name, poison)])
            problems += take_back_rescued(chain, stage)
            problems += half_written(chain / stage)
        (chain / "garble").unlink(missing_ok=True)
        started = time.monotonic()
        forks = c.start(kind, chain, stage, poison)
        if not wait(forks, PATIENCE) or any(fork.returncode for fork in forks):
            send(forks, signal.SIGKILL)
            return [*problems, f"{stage}: the undisturbed start failed"]
        c.seconds.setdefault((kind, stage), time.monotonic() - started)
        if "Traceback" in (chain / f"{stage}.log").read_text(errors="replace"):
            problems.append(f"{stage}: a traceback in its log")
    return problems


def take_back_rescued(chain: Path, stage: str) -> list[str]:
    """A checkpoint that was saved in another place goes where the run's last line says."""
    problems = []
    lines = (chain / f"{stage}.log").read_text(errors="replace").splitlines()
    for line in lines:
        if line.startswith("error: ") and (found := re.search(r"is in (\S+): move it to (\S+)$", line)):
            rescued, place = map(Path, found.groups())
            if rescued.exists() and not (place / rescued.name).exists():
                place.mkdir(parents=True, exist_ok=True)
                shutil.move(rescued, place / rescued.name)
    for folder in chain.glob("rescued-*"):  # what a later start rescued again, or an earlier one
        shutil.rmtree(folder)
    return problems


def half_written(out: Path) -> list[str]:
    """Checkpoints that stand under their name and are not complete; true at any moment."""
    needed = {"model.safetensors", "state.json", "config.json"}
    incomplete = []
    for folder in out.glob("checkpoints/step-*"):
        names = {file.name for file in folder.iterdir()}
        if not names >= needed or not any(name.startswith("optimizer") for name in names):
            incomplete.append(f"{folder.name} is incomplete: {sorted(names)}")
    return incomplete


# --------------------------------------------------------------------------------------- comparing


def content(chain: Path) -> dict[str, Any]:
    """All that a chain has to end with, by name."""
    found: dict[str, Any] = {}
    for stage in ("sft", "dipo"):
        for file in sorted((chain / stage / "latest").resolve().glob("*.safetensors")):
            found[f"{stage}/{file.name}"] = file.read_bytes()
        found[f"{stage}/latest"] = os.readlink(chain / stage / "latest")
    for log in sorted(chain.glob("*/*.jsonl")):
        lines = log.read_text().splitlines()
        found[f"{log.parent.name}/{log.name}"] = [without_clock(json.loads(line)) for line in lines]
    summary = json.loads((chain / "evaluate/summary.json").read_text())
    found["evaluate/summary.json"] = without_clock(summary["benchmarks"])
    return found


def without_clock(value: Any) -> Any:
    """A record without what depends on the clock."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if "second" not in k}
        return {k: without_clock(v) for k, v in kept.items()}
    return value


def differences(chain: Path, reference: Path) -> list[str]:
    """Names of what differs."""
    ours, theirs = content(chain), content(reference)
    return [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]


# ----------------------------------------------------------------------------------------- campaign


def prepare(out: Path, seed: int) -> Campaign:
    """Model, data, and the processes that all others are forks of."""
    import tiny as tiny_task
    from zygote import Zygote

    import model
    from plumbing.lmdeploy_engine import lmdeploy_problem

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background, and inherited
    out.mkdir(parents=True)
    model.checkpoints.tiny(out / "model", **SMALL)
    sizes = ["--sft", "60", "--rl", "60", "--validation", "4", "--test", "12"]
    tiny_task.main(["--out", str(out), *sizes, "--min-terms", "2", "--max-terms", "3"])
    engines = None
    if "not installed" not in lmdeploy_problem():
        engines = Zygote(["lmdeploy_zygote"])
    return Campaign(out, random.Random(seed), Zygote(["sft", "dipo", "evaluate"], fresh=True), engines)


def campaign(c: Campaign, minutes: float, tell: Callable[[str], None]) -> int:
    """Chains until the time is over; how many of them did not end as they should."""
    kinds = [kind for kind in KINDS if kind.engine == "torch" or c.engines]
    if len(kinds) < len(KINDS):
        tell("LMDeploy is not installed: chains with its engine are left out")
    end, number, failed = time.monotonic() + 60 * minutes, 0, 0
    while time.monotonic() < end:
        # The undisturbed chain of this kind, once.
        kind = kinds[number % len(kinds)]
        number += 1
        if kind not in c.references:
            reference = c.out / f"reference-{len(c.references)}"
            if problems := run_chain(c, kind, reference, faults=False):
                tell(f"{kind}, undisturbed: {problems}")
                return 1
            c.references[kind] = reference

        # One to which things happen.
        chain = c.out / f"chain-{number}"
        problems = run_chain(c, kind, chain, faults=True)
        if not problems:
            problems = [f"{name} differs" for name in differences(chain, c.references[kind])]
        c.ended[kind, "failed" if problems else "equal"] += 1
        if problems:
            failed += 1
            tell(f"chain {number} ({kind}), kept in {chain}: {'; '.join(problems)}")
        else:
            shutil.rmtree(chain)
        if number % 20 == 0:
            equal = sum(n for (_, how), n in c.ended.items() if how == "equal")
            tell(f"{number} chains, {equal} equal, {sum(c.injected.values())} faults")
    return failed


def table(c: Campaign) -> str:
    """The faults by kind, and how the chains ended, in Markdown."""
    lines = ["| fault | injected |", "|---|---:|"]
    lines += [f"| {name} | {count} |" for name, count in sorted(c.injected.items())]
    lines += [f"| all | {sum(c.injected.values())} |", "", "| chain | equal | not |", "|---|---:|---:|"]
    for kind in c.references:
        lines.append(f"| {kind} | {c.ended[kind, 'equal']} | {c.ended[kind, 'failed']} |")
    return "\n".join(lines)


def main() -> None:
    """Run a campaign and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0, help="decides kinds, faults and moments")
    parser.add_argument("--out", type=Path, default=Path("runs/faults"), help="chains that differ stay here")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists already")
    c = prepare(options.out.absolute(), options.seed)
    try:
        failed = campaign(c, options.minutes, lambda line: print(line, flush=True))
    finally:
        for zygote in filter(None, (c.zygote, c.engines)):
            zygote.close()
    print(f"\n{table(c)}\n\n{options.minutes:.0f} minutes, seed {options.seed}; {failed} chains failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stage"]:
        run_stage(sys.argv[2:])
    else:
        main()
