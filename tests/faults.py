"""Faults that tests put into whole runs of sft.py, dipo.py and evaluate.py, and what such runs show.

    python tests/faults.py nan_gradient:3 sft.py key=value ...       # a process with the fault in it

A fault takes `patch`, which is monkeypatch.setattr or setattr, and the rest of its name, split at `:`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch as patched

import torch

import plumbing.checkpoint
import plumbing.run_folder
from plumbing import common
from plumbing.common import ROOT, InputError, run_script
from plumbing.config import read_arguments

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128,
}  # fmt: skip
DEFAULTS = {  # of a run of each script that works, and takes a fraction of a second
    "sft": ["steps=5", "batch_size=4", "lr=1e-3", "max_tokens=128"],
    "dipo": ["steps=4", "groups=2", "group_size=4", "max_tokens=16", "max_rounds=4", "lr=1e-3"]
    + ["rewards.speed=1", "threshold=0.005"],
    "evaluate": ["max_tokens=8", "limit=4"],
}
KEEP_ALL = ["save_every=1", "keep_checkpoints=100"]
WEIGHTS = ("model.safetensors", "optimizer.safetensors")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).resolve().parent)])


# ------------------------------------------------------------------------------------ the faults


def own_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def nan_gradient(patch: Callable, first: int, last: int = 0, rank: int = -1) -> None:
    """The gradient of one parameter is nan at these optimizer steps (of this rank, else of all)."""
    clip, calls = torch.nn.utils.clip_grad_norm_, [0]

    def spoiled(parameters, *arguments, **options):
        parameters = list(parameters)
        calls[0] += 1
        if first <= calls[0] <= (last or first) and rank in (-1, own_rank()):
            gradient = parameters[-1].grad
            getattr(gradient, "_local_tensor", gradient).view(-1)[0] = torch.nan
        return clip(parameters, *arguments, **options)

    patch(torch.nn.utils, "clip_grad_norm_", spoiled)


def no_step(patch: Callable, first: int, last: int = 0) -> None:
    """The optimizer leaves out these steps; nothing is wrong otherwise."""
    step, calls = torch.optim.AdamW.step, [0]

    def skipping(self, *arguments, **options):
        calls[0] += 1
        if not first <= calls[0] <= (last or first):
            step(self, *arguments, **options)

    patch(torch.optim.AdamW, "step", skipping)


def nan_row(patch: Callable, call: int, rank: int = -1) -> None:
    """The call-th batch that is packed (of this rank, else of all) has a weight that is nan."""
    import masking

    pack, calls = masking.pack, [0]

    def spoiled(*arguments, **options):
        rows = pack(*arguments, **options)
        calls[0] += 1
        if calls[0] == call and rank in (-1, own_rank()):
            rows[0].weights[0] = torch.nan
        return rows

    patch(masking, "pack", spoiled)


def failing_writes(patch: Callable, first: int, last: int, rank: int = -1) -> None:
    """These calls of write_tensors find no room on the disk (on this rank, else on all)."""
    write, calls = plumbing.checkpoint.write_tensors, [0]

    def failing(file, *rest):
        calls[0] += 1
        if first <= calls[0] <= last and rank in (-1, own_rank()):
            raise InputError(f"{file}: cannot write it (No space left on device)")
        write(file, *rest)

    patch(plumbing.checkpoint, "write_tensors", failing)
    patch(plumbing.run_folder, "write_tensors", failing)


def full(patch: Callable, folder: str, rank: int = -1) -> None:
    """Below this folder there is no room for tensors any more (on this rank, else on all)."""
    write = plumbing.checkpoint.write_tensors

    def failing(file, *rest):
        if Path(folder) in Path(file).parents and rank in (-1, own_rank()):
            raise InputError(f"{file}: cannot write it (No space left on device)")
        write(file, *rest)

    patch(plumbing.checkpoint, "write_tensors", failing)
    patch(plumbing.run_folder, "write_tensors", failing)


def spare(patch: Callable, folder: str) -> None:
    """What finds no room goes to this folder."""
    patch(plumbing.run_folder, "spare_folder", lambda run: Path(folder))


def slow(patch: Callable, phase: str, folder: str, rank: int = -1) -> None:
    """Stay for 30 s in the second call of a phase (on this rank, else on all), with FOLDER/there to tell."""
    import evaluate
    import rollout

    owner, name = {
        "train": (torch.nn.utils, "clip_grad_norm_"),
        "rollout": (rollout.TorchEngine, "generate"),
        "save": (plumbing.run_folder, "write_tensors"),
        "evaluate": (evaluate, "respond"),
        "load": (plumbing.checkpoint, "check_finite"),
    }[phase]
    ordinary, calls = getattr(owner, name), [0]

    def slowly(*arguments, **options):
        calls[0] += 1
        if calls[0] == 2 and rank in (-1, own_rank()):
            Path(folder, "there").touch()
            time.sleep(30)
        return ordinary(*arguments, **options)

    patch(owner, name, slowly)


def at_once(patch: Callable) -> None:
    """A checkpoint that could not be written is tried again without a pause."""
    patch(plumbing.run_folder.RunFolder, "retry_seconds", 0)


def impatient(patch: Callable) -> None:
    """A rank waits half a second only for another one to speak."""
    patch(common, "PATIENCE", 0.5)


def bad_reward(patch: Callable, call: int, rank: int = -1) -> None:
    """There is a reward `moody`, which cannot be computed at the call-th time (on this rank, else on all)."""
    import reward

    calls = [0]

    def moody(graded) -> float:
        calls[0] += 1
        if calls[0] == call and rank in (-1, own_rank()):
            raise InputError(f"reward moody of {graded.question.where}: out of mood")
        return 0.0

    reward.REWARDS["moody"] = moody


def nan_engine(patch: Callable, call: int, rank: int = -1) -> None:
    """The engine's weights become nan before its call-th `generate` (on this rank, else on all)."""
    import rollout

    generate, calls = rollout.TorchEngine.generate, [0]

    def poisoned(engine, *arguments, **options):
        calls[0] += 1
        if calls[0] == call and rank in (-1, own_rank()):
            with torch.no_grad():
                engine.model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
        return generate(engine, *arguments, **options)

    patch(rollout.TorchEngine, "generate", poisoned)


def stale(patch: Callable, first: int, last: int, rank: int = -1) -> None:
    """These updates of the engine's weights do nothing (on this rank, else on all)."""
    import rollout
    from plumbing.checkpoint import gather_into

    update, calls = rollout.TorchEngine.update_weights, [0]

    def lazy(engine, tensors):
        calls[0] += 1
        if first <= calls[0] <= last and rank in (-1, own_rank()):
            for _, tensor in tensors:  # every rank takes part in gathering them
                gather_into(torch.empty(tensor.shape, dtype=engine.model.dtype), tensor)
        else:
            update(engine, tensors)

    patch(rollout.TorchEngine, "update_weights", lazy)


def graders(patch: Callable) -> None:
    """The workers that compare answers are there, one of them at work for long."""
    from plumbing.answers import judge_all

    judge_all([(r"\sqrt{x^2+2x+1}", "x+1", None), (r"\frac{x^2-1}{x-1}", "x+1", None)])


def deaf(patch: Callable) -> None:
    """The process was started with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


ALL = (nan_gradient, no_step, nan_row, failing_writes, full, spare, slow, at_once, impatient)
ALL += (bad_reward, nan_engine, stale, graders, deaf)

FAULTS = {fault.__name__: fault for fault in ALL}


def install(faults: str, patch: Callable) -> None:
    """Faults as on the command line: names with numbers, separated by commas."""
    for fault in filter(None, faults.split(",")):
        name, *numbers = fault.split(":")
        FAULTS[name](patch, *(int(n) if n.lstrip("-").isdigit() else n for n in numbers))


# ------------------------------------------------------------------------------------ the runs


def arguments(good: Path, script: str, out: Path, *more: str) -> list[str]:
    """Arguments of a run that works, except for `more`."""
    data = good / ("sft.jsonl" if script == "sft" else "rl.jsonl")
    return [f"model={good}/model", f"data={data}", f"out={out}", *DEFAULTS[script], *more]


def run_here(script: str, argv: list[str]) -> tuple[int, str]:
    """(exit code, standard error) of a run in this process, from its arguments on."""
    module, stderr, code = sys.modules[script], io.StringIO(), 0
    config_class = {"sft": "SFTConfig", "dipo": "DiPOConfig", "evaluate": "EvalConfig"}[script]
    presets = getattr(module, "PROTOCOLS", None)
    with (
        patched.object(sys, "argv", [f"{script}.py", *argv]),
        contextlib.redirect_stderr(stderr),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            run_script(module.main, read_arguments(getattr(module, config_class), presets))
        except SystemExit as end:
            code = end.code
    return code, stderr.getvalue()


def works(script: str, argv: list[str]) -> str:
    """Standard error of a run in this process that has to work."""
    code, stderr = run_here(script, argv)
    assert code == 0, stderr
    return stderr


def told(stderr: str) -> list[str]:
    """The lines of standard error without those of bars and of the choice of an engine."""
    bar = re.compile(r"[\w.-]+: *(\d+%|\d+/\d+ )|engine: (torch|lmdeploy)$")
    return [line for line in re.split(r"[\r\n]+", stderr) if line.strip() and not bar.match(line.strip())]


def the_error(code: int, stderr: str) -> str:
    """The one line of a run that ended with exit code 2."""
    lines = [line for line in told(stderr) if line.startswith("error: ")]
    assert "Traceback" not in stderr, stderr
    assert code == 2 and len(lines) == 1, f"exit code {code}, one error line was expected in:\n{stderr}"
    return lines[0]


def strict_records(log: Path) -> list[dict]:
    """The records of a log, which hold no nan and no infinity, without what depends on the clock."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in {log.name}")

    records = [json.loads(line, parse_constant=refuse) for line in log.read_text().splitlines()]
    return [{k: v for k, v in r.items() if "seconds" not in k.split("/")} for r in records]


def snapshot(folder: Path) -> dict[str, bytes]:
    """All files of a folder, and its links."""
    found = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    links = {str(f.relative_to(folder)): os.readlink(f).encode() for f in folder.rglob("*") if f.is_symlink()}
    return found | links


def assert_same_end(ours: Path, reference: Path, logs: bool = True) -> None:
    """The newest checkpoints have the same bytes, and the logs the same lines."""
    for name in WEIGHTS:
        same = (ours / "latest" / name).read_bytes() == (reference / "latest" / name).read_bytes()
        assert same, f"{name} differs"
    for log in reference.glob("*.jsonl") if logs else ():
        assert strict_records(ours / log.name) == strict_records(log), f"{log.name} differs"


def make_good(folder: Path) -> Path:
    """A folder with a model and data of a size that runs through in a moment."""
    import tiny as tiny_task

    plumbing.checkpoint.tiny(folder / "model", **SMALL)
    options = ["--out", str(folder), "--sft", "30", "--rl", "30", "--validation", "4", "--test", "4"]
    with contextlib.redirect_stdout(io.StringIO()):
        tiny_task.main([*options, "--min-terms", "2", "--max-terms", "3"])
    return folder


if __name__ == "__main__":
    install(sys.argv[1], setattr)
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
