"""What a run is: its script, its model, its data and all fields of its config, kept in run.json.

A run may be resumed as what it is only. What a field marked `may_change` says does not matter to the result;
everything else does. The checkpoint that a run began with is resolved once: a link that has moved on since
(`model=runs/sft/latest`) is not followed again. Beside that it says how the run was started each time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from plumbing.checkpoint import find_folder
from plumbing.common import ROOT, InputError
from plumbing.config import TrainConfig, changed_fields
from plumbing.ranks import rank_and_world

PIECE = 2**20  # bytes at each end of a file of weights that tell it from another one


def identity(config: TrainConfig, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """What goes to run.json.

    Args:
        before: what is there, if the run is resumed: its resolved checkpoint stays.
    """
    model = {"name": config.model, "folder": "", "fingerprint": ""}
    if before and before["model"]["name"] == config.model:
        model = begun_with(before["model"])
    elif config.model != "tiny":
        folder = find_folder(config.model).resolve()
        model |= {"folder": str(folder), "fingerprint": fingerprint(folder)}
    with open(config.data, "rb") as file:
        data = {"name": config.data, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return {
        "script": type(config).__name__.removesuffix("Config").lower(),
        "model": model,
        "data": data,
        "fields": dataclasses.asdict(config),
        "forced": before["forced"] if before else [],
        "starts": before["starts"] if before else [],
    }


def origin(config: Any, step: int = 0) -> dict[str, Any]:
    """Where what a script is about to make comes from: for people to read, nothing is decided by it.

    Args:
        config: a dataclass; of its fields those are named that have another value than their default.
        step: the last step done, of a run.
    """
    versions = f"{rank_and_world()[1]} ranks, Python {platform.python_version()}, torch {torch.__version__}"
    return {
        "step": step,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        "machine": f"{platform.node()}, {devices()}, {versions}",
        "defaults": changed_fields(config),
    }


def devices() -> str:
    """Cores and GPUs of this machine, as the driver names them: to ask CUDA takes memory of a GPU."""
    gpus: Counter[str] = Counter()
    for file in Path("/proc/driver/nvidia/gpus").glob("*/information"):
        for line in file.read_text(errors="replace").splitlines():
            if line.startswith("Model:"):
                gpus[line.removeprefix("Model:").strip()] += 1
    return ", ".join([f"{os.cpu_count()} CPU cores", *(f"{count} x {name}" for name, count in gpus.items())])


def commit() -> str:
    """The commit of this repository, and whether files differ from it; empty if git does not know it."""
    answers = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        if done.returncode:
            return ""
        answers.append(done.stdout.strip())
    return answers[0] + (" with changes" if answers[1] else "")


def begun_with(model: dict[str, str]) -> dict[str, str]:
    """The checkpoint that a run began with, as it is now: moved, changed, or gone; a link is not followed."""
    if model["name"] == "tiny":
        return model
    for place in (model["folder"], model["name"]):
        if Path(place).is_dir() and fingerprint(Path(place)) == model["fingerprint"]:
            return model | {"folder": str(Path(place).resolve())}
    if Path(model["folder"]).is_dir():
        return model | {"fingerprint": fingerprint(Path(model["folder"]))}
    return model


def fingerprint(folder: Path) -> str:
    """A hash that tells checkpoints apart: config, names and sizes of the weights' files, and their ends.

    The first and the last million bytes of each: to read all of a large model takes minutes.
    """
    digest = hashlib.sha256()
    if (folder / "config.json").is_file():
        digest.update((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        if file.name.startswith(("optimizer", "adapters")):
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as opened:
            digest.update(opened.read(PIECE))
            opened.seek(max(0, size - PIECE))
            digest.update(opened.read(PIECE))
    return digest.hexdigest()


def read_identity(run: Path) -> dict[str, Any] | None:
    """run.json of a run directory; None: there is none.

    Raises:
        InputError: it is damaged.
    """
    file = run / "run.json"
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text())
        found["model"]["name"], found["model"]["folder"], found["model"]["fingerprint"]
        found["script"], found["data"]["sha256"], found["fields"].items(), found["forced"]
        found["starts"] = list(found.get("starts", []))  # older runs have none
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{file}: damaged ({reason}); without it resume=force goes on") from error
    return found


def differences(before: dict[str, Any], now: dict[str, Any], config_class: type[TrainConfig]) -> list[str]:
    """What of a run is another than before and changes its result, in words."""
    changes = []
    if before["script"] != now["script"]:
        changes.append(f"it is a run of {before['script']}.py")
    for part, tells in (("model", "fingerprint"), ("data", "sha256")):
        if before[part][tells] != now[part][tells]:
            changes.append(f"{part} {before[part]['name']} is not what {now[part]['name']} is now")

    # All fields, except those that were compared by content, and those that do not matter.
    free = {f.name for f in dataclasses.fields(config_class) if f.metadata.get("may_change")}
    free |= {"model", "data"}
    if now["fields"]["schedule"] != "constant":
        free.remove("steps")  # they stretch the schedule
    fields = json.loads(json.dumps(now["fields"]))
    defaults = json.loads(
        json.dumps(dataclasses.asdict(config_class()))
    )  # of fields that are younger than it
    for name, value in (defaults | before["fields"]).items():
        if name not in free and name in fields and fields[name] != value:
            changes.append(f"{name} was {value} and is {fields[name]}")
    return changes


def shortened_logs(run: Path, log_bytes: dict[str, int]) -> list[str]:
    """Logs that are shorter than they were when the checkpoint was made, in words."""
    problems = []
    for name, size in log_bytes.items():
        found = (run / name).stat().st_size if (run / name).is_file() else 0
        if found < size:
            problems.append(f"{name} has {found} bytes, and had {size} at the newest checkpoint")
    return problems
