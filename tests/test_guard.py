"""Numbers that are none, an engine that disagrees, and data that does not fit: nothing of it is trained on.

What a skipped step leaves behind is compared with a run in which the optimizer just did not make that step.
"""

import dataclasses
import json
import shutil
import sys

import pytest
import torch
from conftest import TINY, Trainer
from faults import (
    ENVIRONMENT,
    KEEP_ALL,
    WEIGHTS,
    arguments,
    assert_same_end,
    install,
    make_good,
    run_here,
    snapshot,
    strict_records,
    the_error,
    told,
    works,
)
from safetensors.torch import load_file, save_file

import dipo
import reward
import rollout
import sft
from plumbing.checkpoint import encode_prompt, load_tokenizer, tiny
from plumbing.common import ROOT, InputError
from plumbing.config import load_config
from plumbing.guard import Guard


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return make_good(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def peaked(good):
    """A model whose distributions are far from uniform, so that a wrong temperature shows."""
    return tiny(good / "peaked", **TINY)


# ------------------------------------------------------------------------------------ the config


@pytest.mark.parametrize(
    ("script", "override"),
    [
        ("sft", "lr=inf"),
        ("sft", "lr=nan"),
        ("sft", "weight_decay=inf"),
        ("sft", "max_grad_norm=nan"),
        ("sft", "adam_beta1=nan"),
        ("dipo", "lr=inf"),
        ("dipo", "kl_beta=inf"),
        ("dipo", "clip_high=nan"),
        ("dipo", "rewards.accuracy=inf"),
        ("dipo", "rewards.accuracy=nan"),
        ("dipo", "rewards.accuracy=-inf"),
        ("dipo", "threshold=nan"),
        ("dipo", "temperature=inf"),
        ("dipo", "gap_limit.float32=nan"),
        ("evaluate", "threshold=nan"),
        ("evaluate", "sweep=[0.5,inf]"),
    ],
)
def test_a_value_that_is_no_number_is_refused(good, tmp_path, script, override):
    error = the_error(*run_here(script, arguments(good, script, tmp_path / "out", override)))
    assert f"config key {override.split('=')[0].split('.')[0]}:" in error and "finite" in error
    assert not (tmp_path / "out").exists()


def test_negative_weights_of_rewards_are_numbers(good, tmp_path):
    works("dipo", arguments(good, "dipo", tmp_path / "out", "steps=1", "rewards.accuracy=-1"))


# ------------------------------------------------------------------------- a gradient that is nan


@pytest.mark.parametrize("script", ["sft", "dipo"])
def test_a_step_with_a_nan_gradient_moves_nothing(good, tmp_path, monkeypatch, script):
    out, reference = tmp_path / "out", tmp_path / "reference"
    with monkeypatch.context() as patch:
        install("nan_gradient:3", patch.setattr)
        stderr = works(script, arguments(good, script, out, *KEEP_ALL))
    with monkeypatch.context() as patch:
        install("no_step:3", patch.setattr)
        works(script, arguments(good, script, reference, *KEEP_ALL))

    steps = [out / "checkpoints" / f"step-{step:06d}" for step in (2, 3, 4)]
    for name in WEIGHTS:
        before, skipped, after = ((step / name).read_bytes() for step in steps)
        assert skipped == before, f"{name} moved in the step that was skipped"
        assert after != skipped, "the next step is made again"
    assert_same_end(out, reference, logs=False)

    lines, wanted = strict_records(out / "metrics.jsonl"), strict_records(reference / "metrics.jsonl")
    assert [line["step"] for line in lines if "skipped" in line] == [3]
    reason = lines[2].pop("skipped")
    assert "grad_norm is nan" in reason and told(stderr) == [f"step 3 is skipped: {reason}"]
    assert lines[2].pop("grad_norm") is None and wanted[2].pop("grad_norm") > 0
    assert lines == wanted


def test_an_update_of_several_is_skipped_alone(good, tmp_path, monkeypatch):
    """Two updates per batch: the fourth optimizer step is the second one of step 2."""
    out, reference = tmp_path / "out", tmp_path / "reference"
    for folder, fault in ((out, "nan_gradient:4"), (reference, "no_step:4")):
        with monkeypatch.context() as patch:
            install(fault, patch.setattr)
            works("dipo", arguments(good, "dipo", folder, "updates=2"))
    assert_same_end(out, reference, logs=False)
    skipped = [line["step"] for line in strict_records(out / "metrics.jsonl") if "skipped" in line]
    assert skipped == [2]


@pytest.mark.parametrize("script", ["sft", "dipo"])
def test_several_in_a_row_end_the_run_which_can_be_resumed(good, tmp_path, monkeypatch, script):
    out, reference = tmp_path / "out", tmp_path / "reference"
    with monkeypatch.context() as patch:
        install("nan_gradient:2:99", patch.setattr)
        argv = arguments(good, script, out, *KEEP_ALL, "max_skipped=2")
        error = the_error(*run_here(script, argv))
    assert "step 3" in error and "grad_norm is nan" in error and "2 in a row" in error
    names = [f.name for f in sorted(out.glob("checkpoints/*"))]
    assert names == ["step-000001", "step-000002"]
    tensors = load_file(out / "latest" / "model.safetensors").values()
    assert all(tensor.isfinite().all() for tensor in tensors)

    # Step 2 was skipped and is done; the run goes on with step 3.
    works(script, arguments(good, script, out, *KEEP_ALL, "resume=true"))
    with monkeypatch.context() as patch:
        install("no_step:2", patch.setattr)
        works(script, arguments(good, script, reference, *KEEP_ALL))
    assert_same_end(out, reference, logs=False)


def test_skipped_steps_that_are_not_in_a_row_do_not_add_up(good, tmp_path, monkeypatch):
    install("nan_gradient:1,nan_gradient:3,nan_gradient:5", monkeypatch.setattr)
    works("sft", arguments(good, "sft", tmp_path / "out", "max_skipped=2"))
    lines = strict_records(tmp_path / "out" / "metrics.jsonl")
    assert ["skipped" in line for line in lines] == [True, False, True, False, True]


@pytest.mark.parametrize("fault", ["nan_gradient:3:3", "nan_row:3"])
def test_two_ranks_skip_the_step_that_one_of_them_cannot_make(good, tmp_path, monkeypatch, zygote, fault):
    out, reference = tmp_path / "out", tmp_path / "reference"
    command = [f"{fault}:1", "sft.py", *arguments(good, "sft", out, *KEEP_ALL)]
    done = zygote.torchrun(2, [sys.executable, "tests/faults.py", *command], cwd=ROOT, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    (line,) = told(done.stderr)
    assert line.startswith("step 3 is skipped: ")
    if fault == "nan_row:3":
        assert "loss is nan" in line and f"{good}/sft.jsonl:" in line
    skipped = [r["step"] for r in strict_records(out / "metrics.jsonl") if "skipped" in r]
    assert skipped == [3]

    with monkeypatch.context() as patch:
        install("no_step:3", patch.setattr)
        works("sft", arguments(good, "sft", reference))
    before, found, wanted = (
        load_file(f / "model.safetensors")
        for f in (out / "checkpoints/step-000002", out / "checkpoints/step-000003", out / "latest")
    )
    assert all(torch.equal(before[name], found[name]) for name in before)
    reference = load_file(reference / "latest" / "model.safetensors")
    for name, tensor in wanted.items():
        assert (tensor - reference[name]).norm() <= 1e-4 * reference[name].norm(), name


# ------------------------------------------------------------------------------- a loss, a reward


def test_a_nan_loss_names_the_record(good, tmp_path, monkeypatch):
    """The record of line 7 is one that the loss cannot be computed of."""
    out, data, ordinary = tmp_path / "out", good / "sft.jsonl", sft.noise
    response = json.loads(data.read_text().splitlines()[6])["messages"][-1]["content"]
    text = load_tokenizer(good / "model")(response)["input_ids"]

    def spoiled(ids, *rest):
        views = ordinary(ids, *rest)
        if any(ids[i : i + len(text)] == text for i in range(len(ids))):
            views.weights[...] = torch.inf
        return views

    monkeypatch.setattr(sft, "noise", spoiled)
    works("sft", arguments(good, "sft", out, "steps=8", "token_budget=1"))  # 32 of 30: all
    skipped = [r["skipped"] for r in strict_records(out / "metrics.jsonl") if "skipped" in r]
    assert 1 <= len(skipped) < 4
    for reason in skipped:
        assert f"{data}:7 " in reason + " " and reason.count(str(data)) == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_reward_that_is_no_number(good, tmp_path, monkeypatch, value):
    out, reference = tmp_path / "out", tmp_path / "reference"
    calls, spoiled, where = [0], [True], []

    def moody(graded) -> float:
        calls[0] += 1
        if calls[0] == 10 and spoiled[0]:  # of 8 per step
            where.append(graded.question.where)
            return value
        return 0.0

    monkeypatch.setitem(reward.REWARDS, "moody", moody)
    stderr = works("dipo", arguments(good, "dipo", out, "rewards.moody=1", "log_rollouts=99"))
    (line,) = [r for r in strict_records(out / "metrics.jsonl") if "skipped" in r]
    strict_records(out / "rollouts.jsonl")
    assert line["step"] == 2
    for text in ("moody", where[0], str(value)):
        assert text in line["skipped"], text
    assert told(stderr) == [f"step 2 is skipped: {line['skipped']}"]

    spoiled[0] = False
    install("no_step:2", monkeypatch.setattr)
    works("dipo", arguments(good, "dipo", reference, "rewards.moody=1"))
    assert_same_end(out, reference, logs=False)


# ---------------------------------------------------------------------------------- the checkpoint


def spoil(folder, number: float, tensor: str = "model.layers.1.mlp.up_proj.weight", row: int = -1) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor][row, 0] = number
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("number", [torch.nan, -torch.inf])
@pytest.mark.parametrize("script", ["sft", "dipo", "evaluate"])
def test_a_checkpoint_with_a_weight_that_is_no_number_is_refused(good, tmp_path, script, number):
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(good / "model", folder)
    spoil(folder, number)
    error = the_error(*run_here(script, arguments(good, script, out, f"model={folder}")))
    assert f"{folder}: tensor model.layers.1.mlp.up_proj.weight" in error and "nan" in error
    assert not list(out.rglob("step-*")) and not (out / "metrics.jsonl").exists()


@pytest.mark.parametrize("row", [0, -1], ids=["first", "last"])
def test_two_ranks_refuse_it_too(good, tmp_path, zygote, row):
    """The tensor's first row is read by the first rank only, its last one by the second."""
    folder = tmp_path / "model"
    shutil.copytree(good / "model", folder)
    spoil(folder, torch.nan, row=row)
    command = ["impatient", "sft.py", *arguments(good, "sft", tmp_path / "out", f"model={folder}")]
    done = zygote.torchrun(
        2, [sys.executable, "tests/faults.py", *command], cwd=ROOT, env=ENVIRONMENT, timeout=60
    )
    assert "model.layers.1.mlp.up_proj.weight" in the_error(done.returncode, done.stderr)


def test_such_a_checkpoint_is_never_written(good, tmp_path):
    out = tmp_path / "out"
    trainer = Trainer(load_config(sft.SFTConfig, arguments(good, "sft", out)))
    trainer.sft_step([(0, sft.Example(list(range(8)), 2))])
    trainer.folder.save(1, 1, trainer.model, trainer.optimizer)
    before = snapshot(out)
    with torch.no_grad():
        trainer.model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"step-000002: tensor model.layers.1.mlp.up_proj.weight"):
        trainer.folder.save(2, 2, trainer.model, trainer.optimizer)
    assert snapshot(out) == before
    assert not list(out.rglob(".part-*"))


# -------------------------------------------------------------------------------------- the engine


def useless_updates(patch) -> None:
    """Whatever the engine is sent, its weights are nan afterwards."""
    update = rollout.TorchEngine.update_weights

    def useless(engine, tensors):
        update(engine, tensors)
        with torch.no_grad():
            engine.model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan

    patch.setattr(rollout.TorchEngine, "update_weights", useless)


def test_an_engine_with_nan_weights_gets_them_again(good, tmp_path, monkeypatch):
    out, reference = tmp_path / "out", tmp_path / "reference"
    works("dipo", arguments(good, "dipo", reference))
    install("nan_engine:3", monkeypatch.setattr)
    stderr = works("dipo", arguments(good, "dipo", out))
    (line,) = told(stderr)
    assert "nan" in line and "weights again" in line
    assert_same_end(out, reference)


def test_an_engine_that_stays_nan_ends_the_run(good, tmp_path, monkeypatch):
    install("nan_engine:1", monkeypatch.setattr)
    useless_updates(monkeypatch)
    code, stderr = run_here("dipo", arguments(good, "dipo", tmp_path / "out"))
    error = the_error(code, stderr)
    assert "rollout engine" in error and "nan" in error
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_evaluation_while_training_heals_too(good, tmp_path, monkeypatch):
    out, reference = tmp_path / "out", tmp_path / "reference"
    more = ["eval_every=2", f"eval_data={good}/test.jsonl", "eval_max_tokens=8", "eval_threshold=0"]
    works("sft", arguments(good, "sft", reference, *more))
    assert strict_records(reference / "metrics.jsonl")[1]["eval/tpf"] > 2, "nan would not reach the threshold"
    install("nan_engine:1", monkeypatch.setattr)
    works("sft", arguments(good, "sft", out, *more))
    assert_same_end(out, reference)


def test_evaluate_keeps_no_response_of_such_an_engine(good, tmp_path, monkeypatch):
    out, reference = tmp_path / "out", tmp_path / "reference"
    works("evaluate", arguments(good, "evaluate", reference))
    with monkeypatch.context() as patch:
        install("nan_engine:2", patch.setattr)  # the second rule
        error = the_error(*run_here("evaluate", arguments(good, "evaluate", out)))
    assert "rollout engine" in error and "nan" in error
    assert not (out / "summary.json").exists()
    kept = [len(f.read_text().splitlines()) for f in sorted(out.glob("responses-*.jsonl"))]
    assert sorted(kept) == [0, 4], "the responses of the first rule, and none of the second"
    works("evaluate", arguments(good, "evaluate", out))
    for file in reference.glob("responses-*.jsonl"):
        assert strict_records(out / file.name) == strict_records(file)


# ----------------------------------------------------------------------- the gap to the trainer


def hot_engine(patch) -> None:
    """The engine samples at another temperature than it was told."""
    generate = rollout.TorchEngine.generate

    def hot(engine, prompts, seeds, how, *rest):
        return generate(engine, prompts, seeds, dataclasses.replace(how, temperature=1.3), *rest)

    patch.setattr(rollout.TorchEngine, "generate", hot)


FAST = ["lr=1e-2", "steps=6", *KEEP_ALL]


def assert_step_3_changed_nothing(out) -> None:
    for name in WEIGHTS:
        step = [(out / "checkpoints" / f"step-{n:06d}" / name).read_bytes() for n in (2, 3)]
        assert step[0] == step[1]


def test_stale_weights_are_sent_again(good, tmp_path, monkeypatch):
    out = tmp_path / "out"
    install("stale:2:2", monkeypatch.setattr)
    stderr = works("dipo", arguments(good, "dipo", out, *FAST))
    lines = strict_records(out / "metrics.jsonl")
    assert [line["step"] for line in lines if "skipped" in line] == [3]
    assert lines[2]["gap_capped"] > 0.01 and "gap_limit is 0.01" in lines[2]["skipped"]
    assert all(line["gap_capped"] < 1e-4 for line in lines if line["step"] != 3)
    assert told(stderr) == [f"step 3 is skipped: {lines[2]['skipped']}"]
    assert_step_3_changed_nothing(out)


def test_stale_weights_stop_all_updates_of_a_batch(good, tmp_path, monkeypatch):
    """The gap is measured before the first of two updates, and holds for both; it counts as one step."""
    out = tmp_path / "out"
    install("stale:2:2", monkeypatch.setattr)
    works("dipo", arguments(good, "dipo", out, *FAST, "updates=2"))
    lines = strict_records(out / "metrics.jsonl")
    assert [line["step"] for line in lines if "skipped" in line] == [3]
    assert_step_3_changed_nothing(out)


def test_an_engine_that_never_takes_the_weights_ends_the_run(good, tmp_path, monkeypatch):
    out = tmp_path / "out"
    install("stale:2:99", monkeypatch.setattr)
    error = the_error(*run_here("dipo", arguments(good, "dipo", out, *FAST)))
    assert "step 4" in error and "gap_limit" in error and "did not help" in error
    assert (out / "latest").resolve().name == "step-000003"


def test_an_engine_of_another_temperature_is_found(good, peaked, tmp_path, monkeypatch):
    hot_engine(monkeypatch)
    argv = arguments(good, "dipo", tmp_path / "out", f"model={peaked}", "threshold=0.5", "steps=5")
    error = the_error(*run_here("dipo", argv))
    assert "step 2" in error and "gap_limit" in error
    assert not list(tmp_path.rglob("step-*")), "nothing was trained"

    # Without a limit it is trained on all the same.
    argv = arguments(good, "dipo", tmp_path / "off", f"model={peaked}", "threshold=0.5", "steps=2")
    works("dipo", [*argv, "gap_limit.float32=0"])
    lines = strict_records(tmp_path / "off" / "metrics.jsonl")
    assert all(line["gap_capped"] > 0.01 and "skipped" not in line for line in lines)


def test_an_unknown_key_of_the_limit_is_refused(good, tmp_path):
    error = the_error(*run_here("dipo", arguments(good, "dipo", tmp_path / "out", "gap_limit.float16=1")))
    assert "gap_limit" in error and "float16" in error


@pytest.mark.parametrize(
    ("wrong", "far", "allowed"), [(1, -60.0, True), (100, -60.0, False), (1000, 0.1, False)]
)
def test_one_token_that_is_far_off_says_nothing(wrong, far, allowed):
    """Of 1,000 tokens: one by 60 nats is rounding of a rare token, many are another policy."""
    ours, theirs = torch.full((1000,), -1.0), torch.full((1000,), -1.0)
    theirs[:wrong] += far
    held = torch.zeros(1000, dtype=torch.bool)
    gap = dipo.engine_gap(ours, theirs, held)
    metrics = {"loss": 0.0, "grad_norm": 1.0, "gap_capped": float(gap["gap_capped"] / gap["reveals"])}
    config = dipo.DiPOConfig()
    assert Guard(config, "float32").allows(1, metrics) == allowed
    assert ("skipped" in metrics) != allowed


def test_what_a_hold_has_does_not_count(good):
    """The engine has no log-probability of a hold (nan), and nan where there has to be one does count."""
    ours, theirs = torch.zeros(4), torch.tensor([0.0, torch.nan, 0.0, 0.0])
    held = torch.tensor([False, True, False, False])
    assert float(dipo.engine_gap(ours, theirs, held)["gap_capped"]) == 0
    gap = float(dipo.engine_gap(ours, theirs, torch.zeros(4, dtype=torch.bool))["gap_capped"])
    assert not Guard(dipo.DiPOConfig(), "float32").allows(
        1, {"loss": 0.0, "grad_norm": 0.0, "gap_capped": gap}
    )


@pytest.mark.parametrize(
    ("dtype", "engine", "allowed"),
    [
        ("float32", "float32", False),
        ("float32", "bfloat16", True),
        ("bfloat16", "float32", True),
        ("float32", "", True),
    ],
)
def test_the_coarser_of_both_types_decides_the_limit(dtype, engine, allowed):
    guard = Guard(dipo.DiPOConfig(dtype=dtype), engine)
    assert guard.allows(1, {"loss": 0.0, "grad_norm": 0.0, "gap_capped": 0.1}) == allowed


@pytest.mark.parametrize("fault", ["nan_engine:3:1", "stale:2:2:1"])
def test_the_engine_of_one_of_two_ranks(good, tmp_path, zygote, fault):
    """With nan it is healed, and nothing else changes; with old weights both ranks skip the step."""
    logs = []
    for name, faults in (("out", fault), ("wanted", "impatient")):
        argv = arguments(good, "dipo", tmp_path / name, *FAST, "groups=4")
        command = [sys.executable, "tests/faults.py", faults, "dipo.py", *argv]
        done = zygote.torchrun(2, command, cwd=ROOT, env=ENVIRONMENT, timeout=60)
        assert done.returncode == 0, done.stderr
        logs.append(told(done.stderr))
    assert len(logs[0]) == 1 and not logs[1]
    if fault.startswith("nan"):
        assert "nan" in logs[0][0]
        found, wanted = (load_file(tmp_path / n / "latest" / "model.safetensors") for n in ("out", "wanted"))
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        return
    assert logs[0][0].startswith("step 3 is skipped: engine and trainer are ")
    steps = [tmp_path / "out" / "checkpoints" / f"step-{n:06d}" for n in (2, 3, 4)]
    before, skipped, after = (load_file(step / "model.safetensors") for step in steps)
    assert all(torch.equal(before[name], skipped[name]) for name in before)
    assert not all(torch.equal(after[name], skipped[name]) for name in before)


# ----------------------------------------------------------------------------------------- lengths

LONG = "3+" * 70 + "8?"


def with_a_long_one(good, tmp_path, script: str, line: int, count: int = 1):
    """The data file with records too long for the model from a line on."""
    lines = (good / ("sft.jsonl" if script == "sft" else "rl.jsonl")).read_text().splitlines()
    for i in range(line - 1, line - 1 + count):
        record = json.loads(lines[i])
        if script == "sft":
            record["messages"][0]["content"] = LONG
        else:
            record["question"] = LONG
        lines[i] = json.dumps(record)
    file = tmp_path / "long.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.mark.parametrize("script", ["sft", "dipo", "evaluate"])
def test_a_record_that_does_not_fit_is_named_before_the_first_step(good, tmp_path, script):
    data, out = with_a_long_one(good, tmp_path, script, line=4), tmp_path / "out"
    error = the_error(*run_here(script, arguments(good, script, out, f"data={data}")))
    assert f"{data}:4: " in error and " tokens, expected at most " in error
    assert not (out / "metrics.jsonl").exists() and not list(out.glob("responses-*"))


@pytest.mark.parametrize("script", ["sft", "dipo"])
def test_a_question_to_evaluate_that_does_not_fit(good, tmp_path, script):
    data, out = with_a_long_one(good, tmp_path, "dipo", line=2), tmp_path / "out"
    more = ["eval_every=5", f"eval_data={data}", "eval_max_tokens=8"]
    error = the_error(*run_here(script, arguments(good, script, out, *more)))
    assert f"{data}:2: " in error
    assert not (out / "metrics.jsonl").exists()


@pytest.mark.parametrize("script", ["sft", "dipo"])
def test_left_out_it_is_as_if_it_were_not_there(good, tmp_path, script):
    data, out, reference = (
        with_a_long_one(good, tmp_path, script, line=4, count=2),
        tmp_path / "a",
        tmp_path / "b",
    )
    stderr = works(script, arguments(good, script, out, f"data={data}", "too_long=leave_out"))
    (line,) = told(stderr)
    assert line.startswith("2 of 30 left out") and line.endswith(f"first {data}:4")

    lines = data.read_text().splitlines()
    without = tmp_path / "short.jsonl"
    without.write_text("\n".join(lines[:3] + lines[5:]) + "\n")
    works(script, arguments(good, script, reference, f"data={without}"))
    assert_same_end(out, reference)


@pytest.mark.parametrize("script", ["sft", "dipo"])
def test_all_too_long_is_refused_in_any_case(good, tmp_path, script):
    data, out = with_a_long_one(good, tmp_path, script, line=1, count=30), tmp_path / "out"
    argv = arguments(good, script, out, f"data={data}", "too_long=leave_out")
    assert f"{data}:1: " in the_error(*run_here(script, argv))
    assert not (out / "metrics.jsonl").exists()


@pytest.mark.parametrize(("tokens", "fits"), [(104, True), (112, True), (113, False)])
def test_the_last_position_may_be_used(good, tmp_path, tokens, fits):
    """128 positions in blocks of 4, 16 new tokens: a prompt of 112 fits, one of 113 does not."""
    data, out = tmp_path / "one.jsonl", tmp_path / "out"
    empty = len(encode_prompt(load_tokenizer(good / "model"), ""))
    record = {"question": "3" * (tokens - empty), "ground_truth_answer": "11"}
    data.write_text(json.dumps(record) + "\n")
    code, stderr = run_here("dipo", arguments(good, "dipo", out, f"data={data}", "steps=1", "groups=1"))
    if fits:
        assert "tokens, expected" not in stderr and (code == 0 or "no useful group" in stderr), stderr
    else:
        assert "113 tokens, expected at most 112" in the_error(code, stderr)
