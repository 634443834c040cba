"""The run directory of a training script, and the optimizer whose state lies in it.

    config.yaml            the config as it was given last
    metrics.jsonl          a line per step
    rollouts.jsonl         some rollouts of each step (dipo.py)
    checkpoints/step-N     a Hugging Face folder, with the optimizer's state and the counters beside it
    latest                 a link to the newest complete one

A run that was killed at any moment and resumed ends with the bytes of one that was not: a checkpoint
appears under its name only when it is complete, and what was logged after it is cut off. All randomness
of a run is a function of (seed, step, item), so a checkpoint keeps no random state beside its counters.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from plumbing.checkpoint import TensorFiles, find_folder, own_slice, save, tiny, write_tensors
from plumbing.common import InputError, write_json, writing
from plumbing.config import TrainConfig
from plumbing.ranks import barrier, rank_and_world

LOGS = ("metrics.jsonl", "rollouts.jsonl")
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter, beside its step count


class RunFolder:
    """A run directory, opened new or to resume; make and use it on every rank.

    Attributes:
        path: the directory.
        initial: the checkpoint that the run began with.
        weights: the checkpoint with the weights to go on with: the newest of the run, or `initial`.
        base: the one that the trained model is loaded from: `weights`, except with LoRA, whose adapters
            have a file of their own beside the weights that they changed.
        engine_log: where a rollout engine in a subprocess prints.
        step, cursor: the last step done, and how many items of the data were taken by then.
    """

    def __init__(self, config: TrainConfig):
        """Prepare the directory.

        Raises:
            InputError: it holds a run that shall not be resumed, or a checkpoint without state.json.
        """
        self.config, self.path = config, Path(config.out)
        self.rank, self.world = rank_and_world()
        self._checkpoint = self._open()
        self.initial = self._initial_model()
        self.weights = self._checkpoint or self.initial
        self.base = self.initial if config.lora_rank else self.weights
        self.engine_log = self.path / f"engine-rank{self.rank}.log"
        self._wandb = self._start_wandb()

    def _open(self) -> Path | None:
        """The newest complete checkpoint if there is one to resume."""
        done = self._checkpoints()
        if not self.config.resume and (done or (self.path / "metrics.jsonl").exists()):
            raise InputError(f"{self.path} already holds a run: give resume=true or another out")
        newest = done[-1] if done else None
        state = read_state(newest) if newest else {"step": 0, "cursor": 0, "log_bytes": {}}
        self.step, self.cursor = state["step"], state["cursor"]
        barrier()
        if self.rank == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            with writing(self.path / "config.yaml"):
                OmegaConf.save(OmegaConf.structured(self.config), self.path / "config.yaml")
            for log in LOGS:  # what was logged after the checkpoint is done again
                if (self.path / log).exists():
                    os.truncate(self.path / log, state["log_bytes"].get(log, 0))
            for leftover in (self.path / "checkpoints").glob(".part-*"):
                shutil.rmtree(leftover)
            if newest:
                self._link_latest(newest)
                self._drop_old_checkpoints()  # a kill may have come between the newest and this
        barrier()
        return newest

    def _initial_model(self) -> Path:
        if self.config.model != "tiny":
            return find_folder(self.config.model)
        folder = self.path / "tiny"
        if self.rank == 0 and not folder.exists():
            part = self.path / ".part-tiny"
            tiny(part, seed=self.config.seed, block_size=self.config.block_size or 4).rename(folder)
        barrier()
        return folder

    # ------------------------------------------------------------------------------- logs

    def _start_wandb(self) -> Any:
        if not self.config.wandb or self.rank:
            return None
        try:
            import wandb
        except ImportError as error:
            raise InputError("config key wandb: the package is missing, pip install wandb") from error
        settings = dataclasses.asdict(self.config)
        return wandb.init(project=self.config.wandb, dir=self.path, config=settings)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl."""
        if self.rank:
            return
        self.append("metrics.jsonl", [{"step": step, **metrics}])
        if self._wandb:
            self._wandb.log(metrics, step=step)

    def append(self, log: str, records: list[dict[str, Any]]) -> None:
        """Append records to a JSON Lines file of the run; rank 0 does it."""
        if self.rank:
            return
        with writing(self.path / log), open(self.path / log, "a") as file:
            for record in records:
                file.write(json.dumps(record) + "\n")

    # ------------------------------------------------------------------------ checkpoints

    def save(self, step: int, cursor: int, model: torch.nn.Module, optimizer: torch.optim.AdamW) -> None:
        """Write checkpoints/step-N; it appears under that name only when it is complete.

        Every rank writes some of the weights' files and its own shard of the optimizer state. (With
        several machines, `out` has to be on a disk that all of them see.)
        """
        folder = self.path / "checkpoints" / f"step-{step:06d}"
        if folder.exists() or step == 0:
            return
        part = folder.with_name(f".part-{folder.name}")
        part.mkdir(parents=True, exist_ok=True)
        save(model, part, self.initial, self.rank, self.world)
        self._save_optimizer(part, model, optimizer)
        barrier()
        if self.rank == 0:
            log_bytes = {f.name: f.stat().st_size for f in self.path.glob("*.jsonl")}
            counters = {"step": step, "cursor": cursor, "seed": self.config.seed}
            write_json(part / "state.json", counters | {"log_bytes": log_bytes})
            for file in part.glob("*.json"):
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            part.rename(folder)
            self._link_latest(folder)
            self._drop_old_checkpoints()
        barrier()

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
            state = {key: torch.zeros_like(parameter) for key in MOMENTS}
            for key, tensor in state.items():
                part, first = own_slice(tensor)
                if len(part):
                    part.copy_(moments.slice(f"{name}.{key}", first, first + len(part)))
            home = parameter.device if optimizer.defaults["fused"] else "cpu"
            step = moments.slice("step", 0, 1)[0].to(home, copy=True)
            optimizer.state[parameter] = state | {"step": step}

    def _checkpoints(self) -> list[Path]:
        return sorted((self.path / "checkpoints").glob("step-*"))

    def _drop_old_checkpoints(self) -> None:
        for old in self._checkpoints()[: -self.config.keep_checkpoints]:
            shutil.rmtree(old.rename(old.with_name(f".part-{old.name}")))

    def _link_latest(self, checkpoint: Path) -> None:
        link = self.path / ".part-latest"
        link.unlink(missing_ok=True)
        link.symlink_to(checkpoint.relative_to(self.path))
        link.replace(self.path / "latest")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """step, cursor and log_bytes from state.json of a checkpoint."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        return {name: state[name] for name in ("step", "cursor", "log_bytes")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{checkpoint}/state.json: cannot resume from it ({error})") from error


def claim(out: Path, run: dict[str, Any], in_use: bool) -> None:
    """Note in out/config.json what a run without steps is (evaluate.py); call on every rank.

    Args:
        in_use: responses lie there already; config.json says of which settings.

    Raises:
        InputError: of another run.
    """
    file = out / "config.json"
    if in_use:
        before = json.loads(file.read_text()) if file.exists() else {}
        changed = [name for name in run if before.get(name) != json.loads(json.dumps(run[name]))]
        if changed:
            raise InputError(
                f"config key {changed[0]}: {out} holds responses with another value of it; remove that "
                "folder, or give another out"
            )
    out.mkdir(parents=True, exist_ok=True)
    if rank_and_world()[0] == 0:
        write_json(file, run)


# ------------------------------------------------------------------------------ the optimizer


def trained(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of what is trained."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what is trained."""
    parameters = [p for _, p in trained(model)]
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        fused=torch.cuda.is_available() or None,
    )


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
