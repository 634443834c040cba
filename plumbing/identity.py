"""What a run is: its script, its model, its data and all fields of its config, kept in run.json.

A run may be resumed as what it is only. What a field marked `may_change` says does not matter to the result;
everything else does. The checkpoint that a run began with is resolved once: a link that has moved on since
(`model=runs/sft/latest`) is not followed again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from plumbing.checkpoint import find_folder
from plumbing.common import InputError
from plumbing.config import TrainConfig

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
    }


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
    for name, value in before["fields"].items():
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
