"""A run's metrics where a person can watch them, beside metrics.jsonl: TensorBoard's files, or wandb.

    tensorboard --logdir runs        # shows every run below that folder, while they go on

A resumed run goes on in the same place. What was logged after its checkpoint is taken back there: TensorBoard
is told from which step on earlier files do not count, and wandb leaves out steps that it has already.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from pathlib import Path
from typing import Any

from plumbing.common import InputError, first_line, tell, write_json, writing
from plumbing.config import TrainConfig


def flat(metrics: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Metrics without dicts in dicts: {"a": {"b": 1}} is {"a/b": 1}. What is None is left out."""
    found = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            found |= flat(value, f"{above}{name}/")
        elif value is not None:
            found[f"{above}{name}"] = value
    return found


class TensorBoard:
    """Event files in RUN/tensorboard; of metrics only numbers go there, nan and infinity among them."""

    def __init__(self, run: Path, step: int):
        """
        Args:
            step: the last one done; what older files have of later ones is not shown any more.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            problem = "config key log_to: the package is missing, pip install tensorboard"
            raise InputError(problem) from error
        with writing(run / "tensorboard"):
            self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Write the numbers of a step; they are on their way to the disk when this returns."""
        for name, value in flat(metrics).items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, float(value), step)
        self._writer.flush()  # else a killed run would lose what came before its last checkpoint

    def close(self) -> None:
        """Write what waits."""
        self._writer.close()


class Wandb:
    """A run of wandb; RUN/wandb.json has its id, by which a resumed run finds it."""

    def __init__(self, run: Path, config: TrainConfig):
        try:
            import wandb
        except ImportError as error:
            raise InputError("config key log_to: the package is missing, pip install wandb") from error
        file = run / "wandb.json"
        if not file.is_file():
            write_json(file, {"id": secrets.token_hex(8)})
        try:
            self._run = wandb.init(
                project=config.wandb or "nanodirl",
                dir=run,
                id=json.loads(file.read_text())["id"],
                resume="allow",
                config=dataclasses.asdict(config),
            )
        except Exception as error:  # no account, no network, a damaged file: for the user they are one
            raise InputError(f"config key log_to: wandb cannot start ({first_line(error)})") from error

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Hand over a step; wandb sends it by itself."""
        self._run.log(flat(metrics), step=step)

    def close(self) -> None:
        """Send what waits."""
        self._run.finish()


class Watch:
    """Where config.log_to says, on rank 0; it never ends a run that has begun."""

    def __init__(self, config: TrainConfig, run: Path, step: int, rank: int):
        """
        Args:
            step: the last one done, when a run is resumed; else 0.

        Raises:
            InputError: a package is missing, or it cannot start.
        """
        self._to: TensorBoard | Wandb | None = None
        where = config.log_to
        if where == "auto":
            where = "wandb" if config.wandb else "none"
        if rank == 0 and where == "tensorboard":
            self._to = TensorBoard(run, step)
        if rank == 0 and where == "wandb":
            self._to = Wandb(run, config)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Show the metrics of a step."""
        self._try("log", step, metrics)

    def close(self) -> None:
        """The run has ended."""
        self._try("close")

    def _try(self, what: str, *arguments: Any) -> None:
        if self._to is None:
            return
        try:
            getattr(self._to, what)(*arguments)
        except Exception as error:  # a full disk, a network; metrics.jsonl has everything
            name, self._to = type(self._to).__name__, None
            tell(f"{name} gets no more metrics ({first_line(error)}); metrics.jsonl goes on")
