"""The run directory of a training script, and the optimizer whose state lies in it.

    run.json               what run this is: script, model, data, all fields; to resume only the same one.
                           And how it was started, each time: command, commit, machine
    config.yaml            the config as it was given last
    metrics.jsonl          a line per step
    rollouts.jsonl         some rollouts of each step (dipo.py)
    tensorboard            with log_to=tensorboard: the metrics again
    checkpoints/step-N     a Hugging Face folder, with a card (README.md) that says what it is; beside it the
                           optimizer's state, the counters, and what had not ended (unfinished-*.jsonl)
    latest                 a link to the newest complete one
    report.html            all of it to look at (plumbing/report.py)

A run that was killed at any moment and resumed ends with the bytes of one that was not: a checkpoint
appears under its name only when it is complete, and what was logged after it is cut off. All randomness
of a run is a function of (seed, step, item), so a checkpoint keeps no random state beside its counters.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from omegaconf import OmegaConf

from plumbing.card import Card
from plumbing.checkpoint import TensorFiles, own_slice, read_copied, save, tiny, write_tensors
from plumbing.common import InputError, checkpoints, collecting, lock, read_records, tell, write_json, writing
from plumbing.config import TrainConfig
from plumbing.identity import differences, identity, origin, read_identity, shortened_logs
from plumbing.kept import read_settings
from plumbing.published import with_block_size
from plumbing.ranks import barrier, first_problem, gather, rank_and_world
from plumbing.report import try_to_write
from plumbing.watch import Watch

LOGS = ("metrics.jsonl", "rollouts.jsonl")
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter, beside its step count


class RunFolder:
    """A run directory, opened new or to resume; make and use it on every rank.

    Attributes:
        path: the directory.
        initial: the checkpoint that the run began with, links resolved.
        weights: the checkpoint with the weights to go on with: the newest of the run, or `initial`.
        base: the one that the trained model is loaded from: `weights`, except with LoRA, whose adapters
            have a file of their own beside the weights that they changed.
        engine_log: where a rollout engine in a subprocess prints.
        step, cursor: the last step done, and how many items of the data were taken by then.
    """

    retry_seconds = 2.0  # before a checkpoint that could not be written is tried again

    def __init__(self, config: TrainConfig):
        """Prepare the directory.

        Raises:
            InputError: it is in use, or holds a run that shall not be resumed, or another run than the
                config's, or a checkpoint without state.json.
        """
        self.config, self.path = config, Path(config.out)
        self.rank, self.world = rank_and_world()
        self._lock = lock(self.path) if self.rank == 0 else None
        self.weights = Path()  # none yet
        self._noted = False  # whether run.json says of this start
        self._checkpoint = self._open()
        self.initial = self._initial_model()
        self.weights = self._checkpoint or self.initial
        self.base = self.initial if config.lora_rank else self.weights
        self.engine_log = self.path / f"engine-rank{self.rank}.log"
        self._watch = Watch(config, self.path, self.step, self.rank)
        copied = read_copied(self.weights)  # now, since the folder may go away
        self._copied = with_block_size(copied, config.block_size, self.base)
        self._card = Card(config, self._identity, self.initial, self._checkpoint)
        self._next_report = 0.0  # when it is worth the time
        self._unwritten: dict[str, str] = {}  # by log: lines that wait for room on the disk
        self._unsaved = ""  # why the newest checkpoint is not in its place, and where it is

    def _open(self) -> Path | None:
        """The newest complete checkpoint if there is one to resume."""
        # What lies there, and whether it is this run's.
        done = checkpoints(self.path)
        resume = self.config.resume
        if not resume and (done or (self.path / "metrics.jsonl").exists()):
            raise InputError(f"{self.path} already holds a run: give resume=true or another out")
        newest = done[-1] if done else None
        state = read_state(newest) if newest else {"step": 0, "cursor": 0, "log_bytes": {}}
        self.step, self.cursor = state["step"], state["cursor"]
        before = read_identity(self.path) if resume else None
        if newest and before is None and resume != "force":
            raise InputError(f"{self.path}: no run.json that says what run this is; resume=force goes on")
        self._identity = identity(self.config, before)
        changes = differences(before, self._identity, type(self.config)) if before else []
        changes += shortened_logs(self.path, state["log_bytes"])
        if changes and resume != "force":
            raise InputError(f"{self.path} holds another run: {'; '.join(changes)} (resume=force goes on)")
        began_with = self._identity["model"]["folder"]
        needed = not newest or self.config.lora_rank or getattr(self.config, "kl_beta", 0)
        if began_with and needed and not Path(began_with).is_dir():
            raise InputError(f"{began_with}: the run in {self.path} began with it, and it is gone")

        # Take it over: note what it is, and cut off what was done after the checkpoint.
        barrier()
        if self.rank == 0:
            if changes:
                tell(f"{self.path}: resume=force although {'; '.join(changes)}")
                self._identity["forced"] += [{"step": self.step, "changes": changes}]
            self._identity["starts"].append(origin(self.config, self.step))
            if changes or not before:
                write_json(self.path / "run.json", self._identity)
                self._noted = True
            with writing(self.path / "config.yaml"):
                OmegaConf.save(OmegaConf.structured(self.config), self.path / "config.yaml")
            for log in LOGS:
                if (self.path / log).exists():
                    size = (self.path / log).stat().st_size
                    os.truncate(self.path / log, min(size, state["log_bytes"].get(log, 0)))
            for leftover in (self.path / "checkpoints").glob(".part-*"):
                shutil.rmtree(leftover)
            if newest:
                self._link_latest(newest)
                self._drop_old_checkpoints()  # a kill may have come between the newest and this
            elif not before and (self.path / "tiny").exists():
                shutil.rmtree(self.path / "tiny")  # of another run, which never saved
        barrier()
        return newest

    def _initial_model(self) -> Path:
        if self.config.model != "tiny":
            return Path(self._identity["model"]["folder"])
        folder = self.path / "tiny"
        if self.rank == 0 and not folder.exists():
            part = self.path / ".part-tiny"
            tiny(part, seed=self.config.seed, block_size=self.config.block_size or 4).rename(folder)
        barrier()
        return folder

    # ------------------------------------------------------------------------------- logs

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl; what is no number is null there, and `skipped` says why."""
        self.append("metrics.jsonl", [{"step": step, **metrics}])
        self._note_start()
        self._card.log(step, as_json(metrics))
        self._watch.log(step, metrics)
        self._write_report()

    def _note_start(self) -> None:
        """Write run.json with this start of a resumed run, at its first step: a finished one has none."""
        if self.rank == 0 and not self._noted:
            problems: list[str] = []
            with collecting(problems):
                write_json(self.path / "run.json", self._identity)
            self._noted = not problems

    def _write_report(self, running: bool = True) -> None:
        """Write report.html; while the run goes, so rarely that it costs a fiftieth of the time at most."""
        if self.rank == 0 and (not running or time.monotonic() >= self._next_report):
            self._next_report = time.monotonic() + max(20.0, 50 * try_to_write([self.path], running))

    def append(self, log: str, records: list[dict[str, Any]]) -> None:
        """Append records to a JSON Lines file of the run; rank 0 does it.

        Without room on the disk they wait in memory for the next time.
        """
        if self.rank:
            return
        new = "".join(json.dumps(as_json(record)) + "\n" for record in records)
        lines = self._unwritten.get(log, "") + new
        file = self.path / log
        size = file.stat().st_size if file.exists() else 0
        try:
            with writing(file), open(file, "a") as opened:
                opened.write(lines)
            self._unwritten.pop(log, None)
        except InputError as error:
            if file.exists():
                os.truncate(file, size)  # half a line
            if log not in self._unwritten:
                tell(f"{error}: the lines wait in memory")
            self._unwritten[log] = lines

    # ------------------------------------------------------------------------ checkpoints

    def save(
        self,
        step: int,
        cursor: int,
        model: torch.nn.Module,
        optimizer: torch.optim.AdamW,
        unfinished: Iterable[dict[str, Any]] = (),
    ) -> None:
        """Write checkpoints/step-N; it appears under that name only when it is complete.

        Every rank writes some of the weights' files and its own shard of the optimizer state. (With
        several machines, `out` has to be on a disk that all of them see.) If that fails it is tried once
        more, then in another place; the run goes on in any case, and `close` has the last word.

        Args:
            unfinished: records of this rank, which the run goes on with; each has a `number`.
        """
        folder = self.path / "checkpoints" / f"step-{step:06d}"
        if folder.exists() or step == 0:
            return
        state = step, cursor, model, optimizer, list(unfinished)
        problem = self._try_to_save(folder, *state)
        if problem:
            self._say(f"{problem}: trying again in {self.retry_seconds:.0f} s")
            time.sleep(self.retry_seconds)
            problem = self._try_to_save(folder, *state)
        if not problem:
            self._unsaved = ""
            if self.rank == 0:
                self._link_latest(folder)
                self._drop_old_checkpoints()
            barrier()
            return

        # In its place it cannot be. Nothing is dropped, so the checkpoints before it are all still there.
        refuge = gather(free_place(spare_folder(self.path), folder.name))[0]
        if self._try_to_save(refuge, *state):
            self._unsaved = f"{problem}; step {step} is not saved"
        else:
            self._unsaved = f"{problem}; step {step} is in {refuge}: move it to {folder.parent}"
        self._say(self._unsaved)

    def _try_to_save(
        self,
        folder: Path,
        step: int,
        cursor: int,
        model: torch.nn.Module,
        optimizer: torch.optim.AdamW,
        unfinished: list[dict[str, Any]],
    ) -> str:
        """Write a checkpoint; why it failed on some rank, or nothing. Weights that are none end the run."""
        part = folder.with_name(f".part-{folder.name}")
        problems: list[str] = []
        with collecting(problems), writing(part):
            part.mkdir(parents=True, exist_ok=True)
        if problem := first_problem(problems):
            return problem
        try:
            copied = self._copied | {"README.md": self._card.text(step, self._copied)}
            problems = save(model, part, copied, self.rank, self.world)
        except InputError:  # of a weight that is none, at the same one on every rank
            if self.rank == 0:
                shutil.rmtree(part, ignore_errors=True)
            raise
        with collecting(problems):
            self._save_optimizer(part, model, optimizer)
            self._save_unfinished(part, unfinished)
        problem = first_problem(problems)

        # All ranks are done, on one disk: with the counters it is complete.
        if self.rank == 0 and not problem and len(list(part.glob("optimizer*"))) != self.world:
            problem = f"{part}: not all ranks write to this disk"
        if self.rank == 0 and not problem:
            log_bytes = {f.name: f.stat().st_size for f in self.path.glob("*.jsonl")}
            counters = {"step": step, "cursor": cursor, "seed": self.config.seed}
            try:
                write_json(part / "state.json", counters | {"log_bytes": log_bytes})
                for file in (*part.glob("*.json"), *part.glob("*.md")):
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
                part.rename(folder)
            except (InputError, OSError) as error:
                problem = str(error)
        problem = gather(problem)[0]
        if problem and self.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
        barrier()
        return problem

    def _say(self, message: str) -> None:
        if self.rank == 0:
            tell(message)

    def close(self) -> None:
        """End the run: give the directory free.

        Raises:
            InputError: its last checkpoint or lines of a log are not where they belong.
        """
        self._watch.close()
        for log in list(self._unwritten):
            self.append(log, [])
        self._write_report(running=False)
        self.weights = Path()  # not needed any more
        if self.rank == 0:
            self._drop_old_checkpoints()
        if self._lock:
            self._lock.close()
        if self._unwritten:
            places = []
            for log, lines in self._unwritten.items():
                places.append(free_place(spare_folder(self.path), log))
                with writing(places[-1]):
                    places[-1].parent.mkdir(parents=True, exist_ok=True)
                    places[-1].write_text(lines)
            self._unsaved += f"; the last lines of its logs are in {', '.join(map(str, places))}"
        if self._unsaved:
            raise InputError(self._unsaved.removeprefix("; "))

    def _save_optimizer(self, folder: Path, model: torch.nn.Module, optimizer: torch.optim.AdamW) -> None:
        """This rank's slices of AdamW's state.

        Plain safetensors: torch.distributed.checkpoint pickles its index, and its writer for safetensors
        (2.13) builds every file in memory first.
        """
        tensors, first_rows = {}, {}
        for parameter_name, parameter in trained(model):
            state = optimizer.state[parameter]
            for key in MOMENTS:
                name = f"{parameter_name}.{key}"
                part, first_rows[name] = own_slice(state[key])
                tensors[name] = part.cpu().contiguous()
            tensors["step"] = state["step"].cpu().view(1)  # the same for all
        file = f"optimizer-{self.rank + 1:05d}-of-{self.world:05d}.safetensors"
        file = file if self.world > 1 else "optimizer.safetensors"
        write_tensors(folder / file, tensors, "first_rows", json.dumps(first_rows))
        if self.config.lora_rank:
            adapters = {name: p.detach().cpu() for name, p in trained(model)}
            write_tensors(folder / "adapters.safetensors", adapters, "format", "pt")

    def _save_unfinished(self, folder: Path, records: list[dict[str, Any]]) -> None:
        """This rank's; Python writes floats so that they are read as the same, infinity included."""
        if not records:
            return
        file = folder / f"unfinished-{self.rank + 1:05d}-of-{self.world:05d}.jsonl"
        with writing(file), open(file, "w") as opened:
            for record in records:
                opened.write(json.dumps(record) + "\n")
            opened.flush()
            os.fsync(opened.fileno())

    def unfinished(self) -> list[dict[str, Any]]:
        """This rank's records from the checkpoint that is resumed: those that it wrote, in the same order.

        If another number of ranks wrote them they are dealt out by their numbers.

        Raises:
            InputError: a file is damaged.
        """
        files = sorted(self._checkpoint.glob("unfinished-*.jsonl")) if self._checkpoint else []
        if all(file.stem.endswith(f"-of-{self.world:05d}") for file in files):
            own = [file for file in files if file.name.startswith(f"unfinished-{self.rank + 1:05d}-")]
            return [record for file in own for _, record in read_records(file)]
        records = [record for file in files for _, record in read_records(file)]
        return sorted(records, key=lambda record: record["number"])[self.rank :: self.world]

    def restore(self, model: torch.nn.Module, optimizer: torch.optim.AdamW) -> None:
        """Load the optimizer's state (and LoRA's adapters) if the run is resumed.

        Any number of ranks may have written it.
        """
        if not self._checkpoint:
            return
        moments = TensorFiles(self._checkpoint, "optimizer")
        if self.config.lora_rank:
            adapters = TensorFiles(self._checkpoint, "adapters")
            for name, parameter in trained(model):
                parameter.data.copy_(adapters.slice(name, 0, len(parameter)))
        for name, parameter in trained(model):
            state = optimizer.state[parameter]
            for key in MOMENTS:
                part, first = own_slice(state[key])
                if len(part):
                    part.copy_(moments.slice(f"{name}.{key}", first, first + len(part)))
            state["step"].copy_(moments.slice("step", 0, 1)[0])

    def _drop_old_checkpoints(self) -> None:
        """Except the one that the run goes on from: an engine that dies is started again with its files."""
        for old in checkpoints(self.path)[: -self.config.keep_checkpoints]:
            if old != self.weights:
                shutil.rmtree(old.rename(old.with_name(f".part-{old.name}")))

    def _link_latest(self, checkpoint: Path) -> None:
        link = self.path / ".part-latest"
        link.unlink(missing_ok=True)
        link.symlink_to(checkpoint.relative_to(self.path))
        link.replace(self.path / "latest")


def as_json(value: Any) -> Any:
    """The value with None (null) in place of nan and infinity, which are no JSON."""
    if isinstance(value, dict):
        return {name: as_json(v) for name, v in value.items()}
    if isinstance(value, list):
        return [as_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def spare_folder(run: Path) -> Path:
    """Where a run's files go that its own disk has no room for: the place with the most of it."""
    places = {Path(os.environ.get("PWD", ".")), Path(os.path.expanduser("~")), Path(tempfile.gettempdir())}
    usable = sorted(place for place in places if place.is_dir() and os.access(place, os.W_OK))
    roomiest = max(usable, key=lambda place: shutil.disk_usage(place).free, default=run.parent)
    return roomiest / f"rescued-{'-'.join(run.absolute().parts[1:])}"


def free_place(folder: Path, name: str) -> Path:
    """FOLDER/NAME, or FOLDER-2/NAME and so on: the first that no other run has left there."""
    number, place = 1, folder / name
    while place.exists():
        number += 1
        place = folder.with_name(f"{folder.name}-{number}") / name
    return place


def read_state(checkpoint: Path) -> dict[str, Any]:
    """step, cursor and log_bytes from state.json of a checkpoint."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        return {name: state[name] for name in ("step", "cursor", "log_bytes")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{checkpoint}/state.json: cannot resume from it ({error})") from error


def claim(out: Path, run: dict[str, Any], in_use: bool, config: Any) -> IO[str] | None:
    """Lock out, and note in out/config.json what a run without steps is (evaluate.py); call on every rank.

    Args:
        in_use: responses lie there already; config.json says of which settings.
        config: what was given, for the note on where the responses come from.

    Returns:
        The lock, on rank 0.

    Raises:
        InputError: of another run.
    """
    held = lock(out) if rank_and_world()[0] == 0 else None
    file = out / "config.json"
    if in_use:
        before = read_settings(file)
        changed = [name for name in run if before.get(name) != json.loads(json.dumps(run[name]))]
        if changed:
            raise InputError(
                f"config key {changed[0]}: {out} holds responses with another value of it; remove that "
                "folder, or give another out"
            )
    out.mkdir(parents=True, exist_ok=True)
    if rank_and_world()[0] == 0:
        starts = read_settings(file).get("starts", []) if in_use else []
        write_json(file, run | {"starts": [*starts, origin(config)]})
    return held


# ------------------------------------------------------------------------------ the optimizer


def trained(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of what is trained."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what is trained, with its moments: zeros.

    By itself it would make them at the first step, in the memory that activations had then, which could not
    be given back to the rollout engine any more (plumbing/gpu.py).
    """
    fused = torch.cuda.is_available()
    optimizer = torch.optim.AdamW(
        [p for _, p in trained(model)],
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        fused=fused or None,
    )
    for _, parameter in trained(model):
        state = {key: torch.zeros_like(parameter) for key in MOMENTS}
        step = torch.zeros((), device=parameter.device if fused else "cpu")
        optimizer.state[parameter] = {"step": step} | state
    return optimizer


def lr_at(config: TrainConfig, update: int, total: int) -> float:
    """Learning rate of the update-th (from 0) of `total` optimizer updates."""
    scale = min(1.0, (update + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "cosine":
        progress = max(0, update - config.warmup_steps) / max(1, total - config.warmup_steps)
        scale *= (1 + math.cos(math.pi * progress)) / 2
    return config.lr * scale


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def due(every: int, step: int, steps: int) -> bool:
    """Whether something done every so many steps, and after the last one, is due after this step."""
    return bool(every) and (step % every == 0 or step == steps)
