"""log_to: metrics go to TensorBoard's files or to wandb as well, and a resumed run goes on there."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from faults import KEEP_ALL, arguments, make_good, run_here, snapshot, strict_records, the_error, told, works

from plumbing.common import InputError
from plumbing.config import load_config
from plumbing.watch import TensorBoard, Watch, flat
from sft import SFTConfig


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return make_good(tmp_path_factory.mktemp("good"))


@pytest.fixture
def tensorboard():
    """Read the points of a run back as TensorBoard does: {name: [(step, value), ...]}."""
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(run: Path) -> dict[str, list[tuple[int, float]]]:
        found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
        return {name: [(s.step, s.value) for s in found.Scalars(name)] for name in found.Tags()["scalars"]}

    return read


def logged(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The same of metrics.jsonl."""
    points: dict[str, list] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                points.setdefault(name, []).append((record["step"], value))
    return points


def assert_same_points(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        values = [value for _, value in points]
        assert [value for _, value in found[name]] == pytest.approx(values, rel=1e-6), name  # float32 there


# ------------------------------------------------------------------------------- which of them


def where(*argv: str) -> Watch:
    return Watch(load_config(SFTConfig, ["data=data/README.md", *argv]), Path("nowhere"), 0, 0)


def test_by_itself_nothing_is_opened(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for argv in ([], ["log_to=none"], ["log_to=none", "wandb=project"]):
        where(*argv).log(1, {"loss": 1.0})
    for argv in (["log_to=tensorboard"], ["log_to=wandb"], ["wandb=project"]):
        config = load_config(SFTConfig, ["data=data/README.md", *argv])
        Watch(config, Path("nowhere"), 0, rank=1).log(1, {"loss": 1.0})  # rank 0 does it


@pytest.mark.parametrize(
    ("argv", "package"),
    [("log_to=tensorboard", "tensorboard"), ("log_to=wandb", "wandb"), ("wandb=project", "wandb")],
)
def test_a_missing_package_is_one_line(argv, package, good, tmp_path, monkeypatch):
    """The last: an old config, from before log_to, still means wandb."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    error = the_error(*run_here("sft", arguments(good, "sft", tmp_path / "out", argv)))
    assert error == f"error: config key log_to: the package is missing, pip install {package}"


def test_a_project_of_wandb_beside_tensorboard_is_refused():
    with pytest.raises(InputError, match="config key wandb: project, expected none"):
        load_config(SFTConfig, ["data=data/README.md", "log_to=tensorboard", "wandb=project"])
    with pytest.raises(InputError, match="log_to"):
        load_config(SFTConfig, ["data=data/README.md", "log_to=paper"])


def test_dicts_in_dicts_become_names():
    metrics = {
        "loss": 1.0,
        "rewards": {"speed": 0.5, "mine": {"a": None, "b": 2}},
        "none": None,
        "skipped": "x",
    }
    assert flat(metrics) == {"loss": 1.0, "rewards/speed": 0.5, "rewards/mine/b": 2, "skipped": "x"}


# --------------------------------------------------------------------------------- TensorBoard


@pytest.mark.parametrize("script", ["sft", "dipo"])
def test_tensorboard_has_what_metrics_jsonl_has(script, good, tmp_path, tensorboard):
    out = tmp_path / "out"
    evaluation = ["eval_every=2", f"eval_data={good}/test.jsonl", "eval_max_tokens=8"]
    works(script, arguments(good, script, out, "log_to=tensorboard", "steps=3", *evaluation))
    points = tensorboard(out)
    assert_same_points(points, logged(out))
    assert [step for step, _ in points["loss"]] == [1, 2, 3]
    assert [step for step, _ in points["eval/accuracy"]] == [2, 3]


def test_a_resumed_run_has_every_point_once(good, tmp_path, tensorboard):
    """Steps 4 and 5 were done after the newest checkpoint, and are done again."""
    out = tmp_path / "out"
    argv = arguments(good, "sft", out, "log_to=tensorboard", *KEEP_ALL)
    works("sft", [*argv, "steps=5"])
    for step in (4, 5):
        shutil.rmtree(out / "checkpoints" / f"step-00000{step}")
    works("sft", [*argv, "steps=7", "resume=true", "token_budget=64"])
    assert_same_points(tensorboard(out), logged(out))
    assert [step for step, _ in tensorboard(out)["loss"]] == list(range(1, 8))
    assert len(list((out / "tensorboard").iterdir())) == 2, "nothing that was written is lost"

    # And one that begins again, since it had no checkpoint.
    shutil.rmtree(out / "checkpoints")
    works("sft", [*argv, "steps=2", "resume=true"])
    assert [step for step, _ in tensorboard(out)["loss"]] == [1, 2]


def test_all_points_are_on_the_disk_before_the_next_step(tmp_path, tensorboard):
    """A kill takes nothing that a checkpoint has: the writer is not closed here."""
    writer = TensorBoard(tmp_path, 0)
    for step in (1, 2, 3):
        writer.log(step, {"loss": 1.0 / step})
        assert [s for s, _ in tensorboard(tmp_path)["loss"]] == list(range(1, step + 1))
    writer.close()


def test_what_is_no_number(tmp_path, tensorboard):
    writer = TensorBoard(tmp_path, 0)
    writer.log(
        1, {"a": float("nan"), "b": float("inf"), "c": None, "skipped": "why", "d": {"e": 3, "f": True}}
    )
    writer.close()
    points = tensorboard(tmp_path)
    assert points.keys() == {"a", "b", "d/e", "d/f"}
    assert points["b"] == [(1, float("inf"))] and points["a"][0][1] != points["a"][0][1]
    assert points["d/e"] == [(1, 3.0)] and points["d/f"] == [(1, 1.0)]


def test_it_changes_nothing_else(good, tmp_path, tensorboard):
    """Not even with log_to changed on the way: the same checkpoint, the same lines."""
    out, wanted = tmp_path / "out", tmp_path / "wanted"
    works("sft", arguments(good, "sft", wanted, "steps=4"))
    works("sft", arguments(good, "sft", out, "steps=2"))
    works("sft", arguments(good, "sft", out, "steps=4", "resume=true", "log_to=tensorboard"))
    names = [set(snapshot(folder / "latest")) for folder in (out, wanted)]
    assert names[0] == names[1]
    for name in names[0] - {"state.json"}:
        assert (out / "latest" / name).read_bytes() == (wanted / "latest" / name).read_bytes(), name
    assert strict_records(out / "metrics.jsonl") == strict_records(wanted / "metrics.jsonl")
    assert [step for step, _ in tensorboard(out)["loss"]] == [3, 4]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the writer's own
def test_a_disk_that_is_full_ends_the_points_and_not_the_run(good, tmp_path, tensorboard, monkeypatch):
    from tensorboard.summary.writer.record_writer import RecordWriter

    write, calls = RecordWriter.write, [0]

    def failing(self, data):
        calls[0] += 1
        if calls[0] > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", failing)
    stderr = works("sft", arguments(good, "sft", tmp_path / "out", "log_to=tensorboard"))
    (line,) = [line for line in told(stderr) if "TensorBoard" in line]
    assert "no more metrics ([Errno 28] No space left on device)" in line
    assert len(strict_records(tmp_path / "out/metrics.jsonl")) == 5
    assert (tmp_path / "out/latest/model.safetensors").exists()


def test_a_file_where_its_folder_should_be(good, tmp_path, tensorboard):
    out = tmp_path / "out"
    out.mkdir()
    (out / "tensorboard").write_text("a file")
    error = the_error(*run_here("sft", arguments(good, "sft", out, "log_to=tensorboard")))
    assert f"{out}/tensorboard: cannot write it" in error


# --------------------------------------------------------------------------------------- wandb


@pytest.fixture
def offline(monkeypatch):
    """wandb as it is, without an account: it writes to the run directory."""
    pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def sent(run: Path) -> list[tuple[str, int, float]]:
    """(id, step, loss) of everything in the files that wandb would send: records of LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        content, at = file.read_bytes(), 7
        assert len(content) < 2**15, "one block"
        while at < len(content):
            length = int.from_bytes(content[at + 4 : at + 6], "little")
            record = wandb_internal_pb2.Record.FromString(content[at + 7 : at + 7 + length])
            items = {(i.key or "/".join(i.nested_key)): i.value_json for i in record.history.item}
            if "loss" in items:
                found.append((file.stem.removeprefix("run-"), int(items["_step"]), float(items["loss"])))
            at += 7 + length
    return found


def test_wandb_goes_on_under_the_same_id(good, tmp_path, offline):
    out = tmp_path / "out"
    argv = arguments(good, "sft", out, "log_to=wandb")
    works("sft", [*argv, "steps=2"])
    (name,) = json.loads((out / "wandb.json").read_text()).values()
    works("sft", [*argv, "steps=4", "resume=true"])
    losses = [record["loss"] for record in strict_records(out / "metrics.jsonl")]
    found = sent(out)
    assert [item[:2] for item in found] == [(name, 1), (name, 2), (name, 3), (name, 4)]
    assert [loss for _, _, loss in found] == pytest.approx(losses)


def test_a_wandb_that_does_not_start_is_one_line(good, tmp_path, offline):
    out = tmp_path / "out"
    out.mkdir()
    (out / "wandb.json").write_text("[]")
    error = the_error(*run_here("sft", arguments(good, "sft", out, "log_to=wandb")))
    assert "config key log_to: wandb cannot start" in error
