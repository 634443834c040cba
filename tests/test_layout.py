"""The published layout is built as described; the benchmark that compares it with ours runs and refuses."""

import json
import random
import re
import statistics

import layout
import pytest
import torch
import train_step
from conftest import TINY, random_rollout, rollout_of

from masking import HOLD, dense_mask
from model import Sampling
from plumbing.common import InputError

MASK = 259


@pytest.mark.parametrize(
    ("tpf", "at_least", "packed_tokens"), [(1, 1.7, 9216 + 8192 * 4), (2, 2.8, 9216 + 8192 * 2)]
)
def test_token_ratio_of_a_long_trajectory(tpf, at_least, packed_tokens):
    rollout = layout.random_trajectory(1024, 8192, tpf, block_size=4, vocabulary=256)
    assert rollout.tokens_per_forward == pytest.approx(tpf, rel=0.02)
    packed, published = layout.count_tokens(rollout, block_size=4)
    assert packed == pytest.approx(packed_tokens, rel=0.02), "L + R * B / TPF"
    assert published == 4 * 2 * 9216, "B * 2L"
    assert published / packed >= at_least
    assert len(layout.rounds(rollout, 4, MASK)) == 4, "all B rounds reveal something"


@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
def test_rounds_reveal_every_token_once(block_size):
    rollout = random_rollout(random.Random(block_size), block_size, prompt=block_size + 1, blocks=3)
    prompt, length = len(rollout.prompt_ids), len(rollout.prompt_ids + rollout.response_ids)
    passes = layout.rounds(rollout, block_size, mask_id=999)
    revealed = [i for one in passes for i in one.positions[one.scored][one.weights > 0].tolist()]
    assert sorted(revealed) == list(range(prompt, length))
    for one in passes:
        assert (one.ids[one.scored] == 999).all() and (one.targets != HOLD).all()
        assert len(one) == 2 * length
    padded = layout.rounds(rollout, block_size, mask_id=999, pad_to_block_size=True)
    assert len(padded) == block_size
    assert not any(len(one.scored) and one.weights.any() for one in padded[len(passes) :])


def test_rounds_show_the_worked_example():
    """prompt [5 6], response [7 8 9 1 2 3], steps [1 2 3 3 4 3], as in masking.replay."""
    rollout = rollout_of([5, 6], [7, 8, 9, 1, 2, 3])
    rollout.steps = [1, 2, 3, 3, 4, 3]
    first, second = layout.rounds(rollout, block_size=4, mask_id=0)
    assert first.ids.tolist() == [5, 6, 7, 8, 9, 1, 2, 3] + [5, 6, 0, 0, 0, 0, 0, 0]
    assert first.positions[first.scored][first.weights > 0].tolist() == [2, 4, 5, 7]
    assert second.ids.tolist() == [5, 6, 7, 8, 9, 1, 2, 3] + [5, 6, 7, 0, 9, 1, 0, 3]
    assert second.positions[second.scored][second.weights > 0].tolist() == [3, 6]


@pytest.mark.parametrize("attention", ["dense", "joint"])
def test_padding_changes_no_score(tiny_model, attention):
    """... and sees nothing except its own block."""
    rollout = random_rollout(random.Random(3), 4, prompt=6, blocks=3)
    plain = layout.rounds(rollout, 4, MASK)
    padded = layout.rounds(rollout, 4, MASK, limit=40)
    length = len(plain[0])
    for one, longer in zip(plain, padded, strict=True):
        assert len(longer) == 80
        seen = dense_mask(longer)
        assert torch.equal(seen[:length, :length], dense_mask(one))
        assert not seen[:length, length:].any()
        assert (seen[length:].sum(1) == 4).all()
        with torch.no_grad():
            scores = [tiny_model.score(p, Sampling(), attention).logprobs for p in (one, longer)]
        assert (scores[0] - scores[1]).abs().max() < 1e-5


def test_log_normal_lengths():
    lengths = layout.log_normal(1000, limit=8192, block_size=4)
    assert min(lengths) > 0 and max(lengths) == 8192
    assert statistics.mean(lengths) == pytest.approx(2048, rel=0.02)
    assert statistics.median(lengths) < 1700, "skewed"
    assert {n % 4 for n in layout.log_normal(20, limit=898, block_size=4)} == {2}, "whole blocks shorter"


@pytest.fixture
def shape(tmp_path):
    """A config.json of a tiny network."""
    file = tmp_path / "config.json"
    file.write_text(
        json.dumps(TINY | {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300})
    )
    return str(file)


def options(shape: str, *more: str) -> list[str]:
    sizes = ["--prompt", "10", "--response", "42", "--trajectories", "2", "--repeats", "1"]
    return ["--device", "cpu", "--shape", shape, "--token-budget", "200", *sizes, *more]


def test_the_benchmark_reports_the_same_trajectories_on_all_sides(shape, tmp_path, capsys):
    train_step.main(options(shape, "--json", str(tmp_path / "out.json")))
    report = json.loads((tmp_path / "out.json").read_text())
    (result,) = report["shapes"]
    lines = {(line["case"], line["side"], line["attention"]): line for line in result["lines"]}
    assert len(lines) == len(result["lines"]) == 4 + 6
    packed = lines["10 + 42", "packed", "auto"]
    dense = lines["10 + 42", "published, unpadded", "dense"]
    joint = lines["10 + 42", "published, unpadded", "joint"]
    assert dense["tokens"] == joint["tokens"] == 4 * 2 * 52
    rollout = layout.random_trajectory(10, 42, 2.0, 4, vocabulary=299)
    assert packed["tokens"] == layout.count_tokens(rollout, 4)[0]
    for attention in ("dense", "joint"):
        assert (
            lines["2 log-normal up to 42", "published, padded to 52", attention]["tokens"] == 2 * 4 * 2 * 52
        )
    for line in lines.values():
        assert line["gradient_difference"] < 1e-4
        assert line["flop_done"] >= 1, "nobody does with fewer FLOPs than are needed"
        assert min(line["seconds"], line["peak_gib"], line["tokens_per_second"], line["utilisation"]) > 0
        trained = 42 if line["case"] == "10 + 42" else sum(layout.log_normal(2, 42, 4))
        assert line["tokens_per_second"] * line["seconds"] == pytest.approx(trained)
    assert dense["gradient_difference"] == 0, "the reference"
    rounds_together = lines["10 + 42", "published, 4 rounds a batch", "joint"]
    assert rounds_together["peak_gib"] > joint["peak_gib"]
    assert result["linear"]["trajectories"] == [1, 2]
    printed = capsys.readouterr().out.splitlines()
    table = [line for line in printed if line.startswith("|")]
    assert len(table) == 2 + len(lines) and len({line.count("|") for line in table}) == 1
    assert report["command"] in printed[0] and report["date"] in printed[0]


def test_the_benchmark_refuses_other_gradients(shape):
    """Here: of a trajectory whose step map differs in one block."""
    bench, _ = train_step.prepare(shape, train_step.parse(options(shape)))
    rollout = random_rollout(random.Random(1), 4, prompt=6, blocks=4)
    other = rollout_of(rollout.prompt_ids, rollout.response_ids)
    other.steps = rollout.steps[:-4] + [s + 7 for s in (1, 2, 3, 4)]
    ours, reference = bench.packed([rollout]), bench.published([rollout], "unpadded", "dense")
    assert train_step.check_exact(bench.model, reference, [ours], 1e-4)[0] < 1e-5
    with pytest.raises(train_step.NotExact, match="packed"):
        train_step.check_exact(bench.model, reference, [bench.packed([other])], 1e-4)
    with torch.no_grad():
        bench.model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(train_step.NotExact, match="nan"):
        train_step.check_exact(bench.model, reference, [ours], 1e-4)


def test_recorded_trajectories(shape, tmp_path):
    first = random_rollout(random.Random(1), 4, prompt=6, blocks=4)
    second = random_rollout(random.Random(2), 4, prompt=9, blocks=1)
    log = tmp_path / "rollouts.jsonl"
    records = [
        {"question": "?", "prompt_tokens": len(r.prompt_ids), "steps": r.steps} for r in (first, second)
    ]
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    for wanted, got in zip((first, second), layout.read_rollouts(str(log), 4, 256, 9), strict=True):
        assert got.steps == wanted.steps and len(got.prompt_ids) == len(wanted.prompt_ids)
        assert layout.count_tokens(got, 4) == layout.count_tokens(wanted, 4)
    out = tmp_path / "out.json"
    train_step.main(options(shape, "--rollouts", str(log), "--json", str(out)))
    lines = json.loads(out.read_text())["shapes"][0]["lines"]
    longest = len(first.prompt_ids) + len(first.response_ids)
    assert {line["case"] for line in lines} == {"2 recorded"}
    assert lines[-1]["side"] == f"published, padded to {longest}" and lines[-1]["tokens"] == 2 * 8 * longest
    with pytest.raises(InputError, match="--limit"):
        train_step.main(options(shape, "--rollouts", str(log), "--limit", "8"))


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"steps": [1, 2, 3, 4]}, "prompt_tokens is None"),
        ({"prompt_tokens": True, "steps": [1, 2, 3]}, "prompt_tokens is True"),
        ({"prompt_tokens": 4}, "steps is no list"),
        ({"prompt_tokens": 4, "steps": [1, 1, 0, 2]}, "steps is no list"),
        ({"prompt_tokens": 5, "steps": [1, 2, 3, 4]}, "5 + 4 tokens are no blocks of 4"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(tmp_path, record, problem):
    log = tmp_path / "rollouts.jsonl"
    good = {"prompt_tokens": 4, "steps": [1, 2, 3, 4]}
    log.write_text(json.dumps(good) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(InputError, match=re.escape(f"{log}:2: {problem}")):
        layout.read_rollouts(str(log), 4, 256, 9)


@pytest.mark.parametrize(
    "bad",
    [["--repeats", "0"], ["--tpf", "5"], ["--prompt", "11"], ["--device", "tpu"], ["--shape", "9B"], ["--x"]],
)
def test_bad_options_are_refused(shape, bad):
    with pytest.raises(InputError, match="argument|model|--x"):
        train_step.main(options(shape, *bad))
