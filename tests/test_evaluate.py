"""evaluate.py, compare.py: statistics against enumeration, interrupted, sharded runs against a whole one."""

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean

import compare
import numpy as np
import pytest
import tiny as tiny_task

import evaluate
from evaluate import PROTOCOLS, EvalConfig
from plumbing import figures, frontier
from plumbing.checkpoint import stop_ids, tiny
from plumbing.common import InputError
from plumbing.config import load_config
from reward import Graded, Question, Utf8, example, grade
from rollout import Decoding, TorchEngine

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 1024, "initializer_range": 0.3,
}  # fmt: skip


# --------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert figures.pass_at_k(n, c, k) == pytest.approx(fmean(map(any, subsets)))


def test_pass_at_k_of_the_ends():
    assert figures.pass_at_k(16, 0, 16) == 0
    assert figures.pass_at_k(16, 1, 16) == 1
    assert figures.pass_at_k(16, 3, 1) == pytest.approx(3 / 16), "pass@1 is the accuracy"


def all_means(values) -> np.ndarray:
    """Means of every possible resample: the bootstrap without chance."""
    return np.array([fmean(chosen) for chosen in itertools.product(values, repeat=len(values))])


@pytest.mark.parametrize(
    "values",
    [[0.0, 1.0, 1.0, 0.0, 1.0], [0.25, 0.5, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0625, 1.0, 0.5, 0.5, 0.25]],
)
def test_the_bootstrap_interval_is_that_of_all_resamples(values):
    means = np.sort(all_means(values).round(9))
    drawn = figures.resampled_means(values).round(9)
    assert set(drawn) <= set(means)
    for x in set(means):
        exact, share = (means <= x).mean(), (drawn <= x).mean()
        assert abs(share - exact) < 0.025, "5 standard errors of 10,000 draws"
    low, high = figures.bootstrap_interval(values)
    for end, tail in ((low, 0.025), (high, 0.975)):
        margin = 0.008  # 5 standard errors at 0.025
        near = [np.quantile(means, q, method="inverted_cdf") for q in (tail - margin, tail + margin)]
        assert near[0] <= round(end, 9) <= near[1]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([0, 0, 1, 0, 1], [1, 0, 1, 1, 1]),
        ([0.5, 0.25, 0, 1], [0.25, 0.5, 0, 1]),
        ([0.1, 0.3, 0.9, 0.2, 0.6, 0.7], [0.2, 0.3, 1.0, 0.4, 0.5, 0.8]),
        ([0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1]),
    ],
)
def test_the_paired_bootstrap_is_that_of_all_resamples(a, b):
    differences = [y - x for x, y in zip(a, b, strict=True)]
    mean = fmean(differences)
    centred = all_means([d - mean for d in differences])
    exact = (np.abs(centred) >= abs(mean) - 1e-9).mean()
    difference, low, high, p = figures.paired_bootstrap(a, b)
    assert difference == pytest.approx(mean)
    assert low <= mean <= high
    assert p == pytest.approx(exact, abs=5 * (exact * (1 - exact) / 10_000) ** 0.5 + 2e-4)
    back = figures.paired_bootstrap(b, a)
    assert back == pytest.approx((-mean, -high, -low, p), abs=1e-2)


def test_a_run_does_not_differ_from_itself():
    assert figures.paired_bootstrap([0.5, 0, 1], [0.5, 0, 1]) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["1", "2", "2"], 1),
        (["3", "1", "2", "1", "3"], 0),  # a tie: the first
        (["1", " $2$", "2 "], 1),  # the same except for white space and $
        ([None, "x", None], 1),
        ([None, None], None),
    ],
)
def test_majority(answers, winner):
    assert figures.majority(answers) == winner


def graded(answer: str | None, gold: str = "2", truncated: bool = False, tokens: int = 4) -> Graded:
    text = "?" if answer is None else f"\\boxed{{{answer}}}"
    (verdict,) = grade([example(text, truncated=truncated)], [Question("?", gold)], Utf8(), block_size=4)
    verdict.rollout.num_tokens = tokens
    return verdict


def test_figures_of_several_samples():
    groups = [
        [graded("2"), graded("2"), graded("3"), graded("4")],
        [graded("2"), graded("5"), graded("5"), graded(None)],
        [graded("2", truncated=True), graded("2", truncated=True), graded("7"), graded("9", tokens=8)],
    ]
    figures = evaluate.full_summary(groups)
    assert figures["accuracy"] == pytest.approx(fmean([2 / 4, 1 / 4, 0]))
    assert figures["pass_at_k"] == pytest.approx(2 / 3) == figures["pass_at"]["4"]
    assert figures["pass_at"] == pytest.approx({"1": 1 / 4, "2": fmean([5 / 6, 1 / 2, 0]), "4": 2 / 3})
    assert figures["maj_at_k"] == pytest.approx(1 / 3)
    assert figures["truncated"] == pytest.approx(2 / 12)
    assert figures["tokens"] == pytest.approx(52 / 12)
    assert figures["accuracy_low"] <= figures["accuracy"] <= figures["accuracy_high"]


def test_truncated_samples_have_no_vote():
    finished = [graded("2"), graded("9")]
    unfinished = [graded("7", truncated=True), graded("7", truncated=True)]
    assert evaluate.majority_is_right(unfinished + finished)
    assert not evaluate.majority_is_right([graded("2", truncated=True)] * 3)


def test_benchmarks_count_alike_in_the_average():
    same = {n: 0.5 for n in ("pass_at_k", "maj_at_k", "tpf", "tokens", "truncated")} | {"samples": 2}
    large = same | {
        "accuracy": 0.9,
        "questions": 900,
        "samples": 2,
        "seconds": 3.0,
        "tokens_per_second": 10.0,
    }
    small = same | {
        "accuracy": 0.1,
        "questions": 30,
        "samples": 2,
        "seconds": 1.0,
        "tokens_per_second": 50.0,
    }
    mean = figures.average([large, small])
    assert mean["accuracy"] == pytest.approx(0.5)
    assert (mean["questions"], mean["seconds"]) == (930, 4.0)
    assert mean["tokens_per_second"] == pytest.approx(80 / 4)
    assert figures.average([large]) is large


# --------------------------------------------------------------------------- protocols and benchmarks


@pytest.fixture
def files_are_there(tmp_path, monkeypatch):
    """The files of the demo and of all benchmarks; a config that names a missing file is refused."""
    monkeypatch.chdir(tmp_path)
    names = ["runs/demo/data/test.jsonl", *(f"data/hub/{name}.jsonl" for name in figures.BENCHMARKS)]
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text('{"question": "1+1?", "answer": "2"}\n')
    for run in ("demo/dipo", "sdar_8b_dipo"):
        Path("runs", run, "latest").mkdir(parents=True)


def test_a_protocol_sets_fields_and_anything_explicit_wins(tmp_path, files_are_there):
    config = load_config(EvalConfig, ["protocol=dirl"], PROTOCOLS)
    assert (config.samples, config.top_k, config.threshold, config.max_tokens) == (16, 50, 0.9, 8192)
    assert (config.temperature, config.top_p, config.min_tokens) == (1.0, 1.0, 128)
    assert config.banned == ["<|endoftext|>"] and config.dtype == "bfloat16"
    asked = config.prompt.replace("{question}", "1+1?")
    assert asked == "1+1?\nPlease reason step by step, and put your final answer within $\\boxed{}$."
    file = tmp_path / "eval.yaml"
    file.write_text("protocol: dirl\nsamples: 4\nmin_tokens: 7\n")
    config = load_config(EvalConfig, ["--config", str(file), "min_tokens=0"], PROTOCOLS)
    assert (config.samples, config.min_tokens, config.top_k) == (4, 0, 50)
    config = load_config(EvalConfig, ["protocol=greedy"], PROTOCOLS)
    assert (config.top_k, config.samples, config.max_tokens) == (1, 1, 8192)
    assert load_config(EvalConfig, [], PROTOCOLS) == EvalConfig()


def test_a_protocol_that_was_changed_is_not_called_by_its_name_alone(files_are_there):
    def name(*overrides):
        return evaluate.name_protocol(load_config(EvalConfig, [*overrides, "protocol=dirl"], PROTOCOLS))

    assert name("seed=3", "rules=[dynamic]") == "dirl"
    assert name("limit=9", "samples=4", "top_k=50") == "dirl except for samples=4, limit=9"


def test_the_shipped_config_is_the_protocol(files_are_there):
    config = load_config(EvalConfig, ["--config", str(ROOT / "configs/eval.yaml")], PROTOCOLS)
    differs = {k for k, v in vars(EvalConfig(**PROTOCOLS["dirl"])).items() if v != getattr(config, k)}
    assert differs <= {"model", "data", "out", "protocol"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small model that knows nothing, and questions: 40 in test.jsonl."""
    place = tmp_path_factory.mktemp("place")
    tiny(place / "model", **SMALL)
    tiny_task.main(["--out", str(place), "--sft", "8", "--rl", "8", "--validation", "2", "--test", "40"])
    return place


def arguments(folder: Path, out: Path, *changes: str) -> list[str]:
    settings = ["samples=2", "top_k=0", "max_tokens=24", "limit=20", "threshold=0.4", "seed=5"]
    return [f"model={folder}/model", f"data={folder}/test.jsonl", f"out={out}", *settings, *changes]


def evaluate_with(*argv: str) -> None:
    evaluate.main(load_config(EvalConfig, list(argv), PROTOCOLS))


def summary_of(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def untimed(out: Path) -> tuple[dict, dict[str, list[dict]]]:
    """Summary and responses without what the clock says, and what rounds otherwise in another batch."""

    def strip(item):
        if isinstance(item, dict):
            gone = ("seconds", "tokens_per_second", "out", "max_batch", "logprobs")
            return {k: strip(v) for k, v in item.items() if k not in gone}
        return item

    files = sorted(out.glob("responses-*.jsonl"))
    records = {f.name: [strip(record) for record in read_lines(f)] for f in files}
    return strip(summary_of(out)), records


def test_benchmarks_by_name_and_file_in_one_run(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("data/hub").mkdir(parents=True)
    record = {"problem": "Half of one?", "answer": r"\frac{1}{2}"}
    Path("data/hub/math500.jsonl").write_text(json.dumps(record) + "\n")
    Path("data/hub/aime24.jsonl").write_text(json.dumps(record | {"answer": 204}) + "\n")
    data = f"data=[math500,aime24,{folder}/test.jsonl]"
    evaluate_with(*arguments(folder, tmp_path / "out", data, "limit=3"))
    summary = summary_of(tmp_path / "out")
    assert set(summary) == {"config", "static", "dynamic", "benchmarks"}
    for rule in ("static", "dynamic"):
        found = summary["benchmarks"][rule]
        assert {name: f["questions"] for name, f in found.items()} == {"math500": 1, "aime24": 1, "test": 3}
        assert summary[rule]["tpf"] == pytest.approx(fmean(f["tpf"] for f in found.values()))
    printed = capsys.readouterr().out
    assert printed.startswith((tmp_path / "out" / "table.md").read_text())
    lines = printed.splitlines()
    published = [line for line in lines if line.startswith("| published |")]
    measured = [line for line in lines if line.startswith("| **measured** |")]
    assert len(published) == 8 and "SDAR-8B-Chat, dynamic | 71.9 / 2.4 / 616.6 |" in published[3]
    assert len(measured) == 2
    tpf = summary["benchmarks"]["dynamic"]["aime24"]["tpf"]
    assert [cell.strip() for cell in measured[1].split("|")][5].split(" / ")[1] == f"{tpf:.1f}"
    assert measured[1].count("| - ") == 4, "three benchmarks that were not measured, hence no mean"
    (caption,) = (line for line in lines if "2512.22234" in line)
    assert "not measured here" in caption and caption.endswith("this run, protocol none except for limit=3.")
    assert sum(line.startswith("| mean, ") for line in lines) == 2


def test_published_rows_agree_with_their_means():
    for line in figures.PUBLISHED.strip().splitlines():
        name, *cells, mean = (cell.strip() for cell in line.split("|"))
        assert len(cells) == len(figures.BENCHMARKS)
        accuracies = [float(cell.split("/")[0]) for cell in cells]
        assert fmean(accuracies) == pytest.approx(float(mean), abs=0.11), name
        tpf = [float(cell.split("/")[1]) for cell in cells]
        assert all(t > 1 for t in tpf) if "dynamic" in name else tpf == [1.0] * 5


def test_all_five_benchmarks_have_a_mean():
    of_one = {"accuracy": 0.25, "tpf": 2.0, "tokens": 10.0}
    results = {"dynamic": {name: of_one for name in figures.BENCHMARKS}}
    assert figures.published_table("mine", "dirl", results).splitlines()[-1] == (
        "| **measured** | **mine, dynamic** |" + " 25.0 / 2.0 / 10.0 |" * 5 + " 25.0 |"
    )


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (["data={a: 1}"], "config key data"),
        (["data=[{folder}/test.jsonl,{folder}/test.jsonl]"], "two files with the name test"),
    ],
)
def test_what_is_refused(folder, tmp_path, monkeypatch, changes, wanted):
    monkeypatch.chdir(tmp_path)
    changes = [c.replace("{folder}", str(folder)) for c in changes]
    with pytest.raises(InputError, match=wanted):
        evaluate_with(*arguments(folder, tmp_path / "out", *changes))
    assert not (tmp_path / "out" / "summary.json").exists()


# ------------------------------------------------------------------- interrupted, repeated, sharded


def evaluate_and_kill(zygote, argv: list[str], file: Path, lines: int) -> None:
    """SIGKILL once the file has so many lines."""
    deadline = time.monotonic() + 120
    with tempfile.TemporaryFile("w+") as printed:
        command, environment = [sys.executable, "evaluate.py", *argv], os.environ | SETTINGS
        process = zygote.popen(command, cwd=ROOT, env=environment, stdout=printed, stderr=printed)
        try:
            while not file.exists() or file.read_bytes().count(b"\n") < lines:
                if process.poll() is not None:
                    printed.seek(0)
                    pytest.fail(f"ended before it was killed: {printed.read()}")
                assert time.monotonic() < deadline
                time.sleep(0.002)
        finally:
            process.kill()
    assert process.wait() == -signal.SIGKILL


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    evaluate_with(*arguments(folder, out))
    return out


def test_a_run_that_is_killed_twice_goes_on_to_the_same_result(folder, whole, tmp_path, zygote):
    out = tmp_path / "out"
    part = out / "responses-test-dynamic.rank0.jsonl"
    evaluate_and_kill(zygote, arguments(folder, out, "max_batch=1"), part, 5)
    assert (out / "responses-test-static.jsonl").exists()
    whole_lines = part.read_text().rpartition("\n")[0] + "\n"
    part.write_text(whole_lines + '{"response_ids": [1, 2')  # half a line
    evaluate_and_kill(zygote, arguments(folder, out, "max_batch=1"), part, 12)
    before = part.read_text()
    kept = [json.loads(line) for line in before.split("\n")[:-1]]
    assert 12 <= len(kept) < 40, "it was killed in the middle, twice"
    assert before.startswith(whole_lines)
    part.write_text(before[: before.rindex("\n") + 1] + '{"response_ids": [1, 2')
    evaluate_with(*arguments(folder, out))
    assert untimed(out) == untimed(whole)
    finished = {r["seed"]: r for r in read_lines(out / "responses-test-dynamic.jsonl")}
    assert len(finished) == 40
    for record in kept:
        assert finished[record["seed"]]["seconds"] == record["seconds"], "kept, not answered again"
    latest = max(record["seconds"] for record in kept)
    assert all(r["seconds"] > latest for s, r in finished.items() if s not in {k["seed"] for k in kept})
    assert not list(out.glob("*.rank*")) and not list(out.glob("*.part"))


def test_a_finished_run_is_reported_again_without_new_answers(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    evaluate_with(*arguments(folder, out))
    first = summary_of(out)
    asked = []
    generate = TorchEngine.generate
    monkeypatch.setattr(TorchEngine, "generate", lambda e, p, *a: (asked.extend(p), generate(e, p, *a))[1])
    evaluate_with(*arguments(folder, out))
    assert asked == [] and summary_of(out) == first


def test_one_process_goes_on_from_the_ranks_of_an_interrupted_run(folder, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_bytes((whole / "config.json").read_bytes())
    for rule in ("static", "dynamic"):
        lines = (whole / f"responses-test-{rule}.jsonl").read_text().splitlines(keepends=True)
        for rank, share in ((0, lines[:12:2]), (7, lines[1:12:2])):
            file = out / f"responses-test-{rule}.rank{rank}.jsonl"
            file.write_text("".join(share) + lines[20][:-1])  # complete except for its line break
    asked = []
    generate = TorchEngine.generate
    monkeypatch.setattr(TorchEngine, "generate", lambda e, *a: (asked.append(len(a[0])), generate(e, *a))[1])
    evaluate_with(*arguments(folder, out))
    assert asked == [28, 28]
    assert untimed(out) == untimed(whole)
    assert not list(out.glob("*.rank*"))


@pytest.mark.parametrize("change", ["threshold=0.5", "limit=19", "samples=3", "weights", "questions"])
def test_answers_of_another_config_are_not_mixed_in(folder, tmp_path, change):
    import shutil

    mine = Path(shutil.copytree(folder, tmp_path / "mine"))
    evaluate_with(*arguments(mine, tmp_path / "out"))
    before = untimed(tmp_path / "out")
    changes = [change]
    if change == "weights":
        os.utime(mine / "model" / "model.safetensors", (1, 1))
        changes = []
    if change == "questions":
        text = (mine / "test.jsonl").read_text()
        (mine / "test.jsonl").write_text(text.replace("+", "-", 1))
        changes = []
    with pytest.raises(InputError, match=f"config key {change.split('=')[0]}: .*out holds responses"):
        evaluate_with(*arguments(mine, tmp_path / "out", *changes))
    assert untimed(tmp_path / "out") == before
    evaluate_with(*arguments(mine, tmp_path / "new", *changes))


def test_a_refused_start_does_not_claim_the_folder(folder, tmp_path):
    with pytest.raises(InputError, match="1024 positions"):
        evaluate_with(*arguments(folder, tmp_path / "out", "max_tokens=2000"))
    for file in (tmp_path / "out").glob("responses-*"):
        assert file.stat().st_size == 0
    evaluate_with(*arguments(folder, tmp_path / "out", "rules=[dynamic]", "limit=2"))


@pytest.mark.parametrize(("line", "why"), [("damaged", "not JSON"), ('{"text": ""}', "not a response")])
def test_a_damaged_line_is_named(folder, tmp_path, line, why):
    evaluate_with(*arguments(folder, tmp_path / "out", "limit=2"))
    file = tmp_path / "out" / "responses-test-static.jsonl"
    file.write_text(f"{line}\n" + file.read_text())
    with pytest.raises(InputError, match=f"responses-test-static.jsonl:1: {why}"):
        evaluate_with(*arguments(folder, tmp_path / "out", "limit=2"))


def test_two_ranks_give_the_summary_of_one_and_go_on_from_one(folder, whole, tmp_path, zygote):
    out = tmp_path / "out"
    part = out / "responses-test-static.rank0.jsonl"
    evaluate_and_kill(zygote, arguments(folder, out, "max_batch=1"), part, 7)
    command = [sys.executable, "evaluate.py", *arguments(folder, out)]
    done = zygote.torchrun(2, command, cwd=ROOT, env=os.environ | SETTINGS, timeout=180)
    assert done.returncode == 0, done.stderr[-5000:]
    assert untimed(out) == untimed(whole)
    assert done.stdout.count("| static | 20 | 2 |") == 1, "only one rank reports"
    assert not list(out.glob("*.rank*"))


def test_responses_have_all_that_a_replay_needs(whole):
    for rule in ("static", "dynamic"):
        records = read_lines(whole / f"responses-test-{rule}.jsonl")
        assert [(r["index"], r["sample"]) for r in records] == list(itertools.product(range(20), range(2)))
        assert [r["seed"] for r in records] == list(range(5, 45))
        for r in records:
            assert len(r["steps"]) == len(r["response_ids"]) and r["steps"][0] >= 1
            assert (r["prompt_tokens"] + len(r["response_ids"])) % 4 == 0, "whole blocks"
            assert r["tpf"] == len(r["steps"]) / len(set(r["steps"]))
            assert len(r["logprobs"]) == len(r["steps"]) and max(r["logprobs"]) <= 0
            assert all(float(f"{x:.3e}") == x for x in r["logprobs"]), "four digits"
            assert r["block_size"] == 4
        figures = summary_of(whole)["benchmarks"][rule]["test"]
        assert figures["accuracy"] == fmean(r["correct"] for r in records)
        assert figures["tokens"] == pytest.approx(fmean(r["num_tokens"] for r in records))


@pytest.mark.skipif("NANODIRL_BENCHMARKS" not in os.environ, reason="NANODIRL_BENCHMARKS not set")
def test_math500_is_finished_after_a_kill(folder, tmp_path, zygote):
    data = Path(os.environ["NANODIRL_BENCHMARKS"]) / "math500.jsonl"
    if not data.exists():
        pytest.skip("no math500.jsonl in NANODIRL_BENCHMARKS")
    tiny(tmp_path / "model", **SMALL | {"max_position_embeddings": 8192})
    common = [f"model={tmp_path}/model", f"data={data}", "max_tokens=16", "rules=[dynamic]", "threshold=0.2"]
    part = tmp_path / "killed" / "responses-math500-dynamic.rank0.jsonl"
    evaluate_and_kill(zygote, [*common, f"out={tmp_path}/killed", "max_batch=32"], part, 50)
    assert part.read_bytes().count(b"\n") < 500
    for out in ("killed", "whole"):
        evaluate_with(*common, f"out={tmp_path}/{out}")
    assert untimed(tmp_path / "killed") == untimed(tmp_path / "whole")
    assert summary_of(tmp_path / "whole")["dynamic"]["questions"] == 500
    assert "| **measured** |" in (tmp_path / "whole" / "table.md").read_text()


# ------------------------------------------------------------------------------ comparison and sweep


def write_run(out: Path, verdicts: list[list[bool]], rule: str = "dynamic", question: str = "?") -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text("{}")
    records = [
        {"index": i, "sample": j, "question": question, "gold": str(i), "correct": correct}
        for i, group in enumerate(verdicts)
        for j, correct in enumerate(group)
    ]
    (out / f"responses-x-{rule}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_two_runs_are_compared_question_by_question(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a = [[i % 3 == 0, False] for i in range(40)]
    b = [[i % 3 == 0 or i % 4 == 0] for i in range(40)]
    write_run(Path("a"), a)
    write_run(Path("b"), b)
    write_run(Path("a"), a, "static")  # not in both
    (line,) = compare.compare(Path("a"), Path("b")).splitlines()[2:]
    d, low, high, p = figures.paired_bootstrap([fmean(g) for g in a], [fmean(g) for g in b])
    assert line == (
        f"| x-dynamic | 40 | {100 * 14 / 80:.1f} % | {100 * 20 / 40:.1f} % | {100 * d:+.1f} "
        f"| {100 * low:+.1f} to {100 * high:+.1f} | {p:.4f} |"
    )
    assert p < 0.01
    write_run(Path("c"), b, question="another?")
    with pytest.raises(InputError, match="c/responses-x-dynamic.jsonl: other questions than a/"):
        compare.compare(Path("a"), Path("c"))
    write_run(Path("d"), b, "sequential")
    with pytest.raises(InputError, match="a and d have no benchmark and decoding rule in common"):
        compare.compare(Path("a"), Path("d"))


def run_compare(*runs: str, **settings) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks/compare.py"), *runs]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **settings)


def test_finished_runs_can_be_compared(whole):
    done = run_compare(str(whole), str(whole))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == ["test-dynamic", "test-static"]
    assert all("| +0.0 | +0.0 to +0.0 | 1.0000 |" in line for line in lines)


@pytest.mark.parametrize(
    ("runs", "wanted"),
    [
        ([], ["RUN"]),
        (["runs/a"], ["RUN"]),
        (["runs/a", "runs/b", "runs/c"], ["runs/c"]),
        (["runs/a", "runs/b"], ["runs/a", "no finished evaluation"]),
        (["good", "runs/b"], ["runs/b", "no finished evaluation"]),
        (["good", "half"], ["half/responses-x-dynamic.jsonl:2", "not JSON"]),
        (["other", "good"], ["other/responses-x-dynamic.jsonl:1", "'correct'"]),
    ],
)
def test_what_cannot_be_compared_is_named_in_one_line(tmp_path, runs, wanted):
    for name in ("good", "half", "other"):
        write_run(tmp_path / name, [[True], [False]])
    for name, old, new in (("half", "false}", ""), ("other", "correct", "right")):
        file = tmp_path / name / "responses-x-dynamic.jsonl"
        file.write_text(file.read_text().replace(old, new))
    done = run_compare(*runs, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: ")
    for text in wanted:
        assert text in error


def test_a_sweep_is_measured_and_plotted(folder, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("matplotlib.pyplot.close", shown.append)
    evaluate_with(*arguments(folder, tmp_path / "out", "sweep=[0.9,0.1,0.3]", "limit=12"))
    summary = summary_of(tmp_path / "out")
    names = {"config", "static", "dynamic-0.1", "dynamic-0.3", "dynamic-0.9", "aup", "benchmarks"}
    assert set(summary) == names
    tpf = [summary[f"dynamic-{t}"]["tpf"] for t in (0.1, 0.3, 0.9)]
    accuracy = [100 * summary[f"dynamic-{t}"]["accuracy"] for t in (0.1, 0.3, 0.9)]
    area = frontier.aup(np.array(tpf), np.array(accuracy), max(accuracy))
    assert summary["aup"] == {"test": pytest.approx(float(area))}
    assert f": test {area:.1f}" in (tmp_path / "out" / "table.md").read_text()
    assert tpf[0] > tpf[1] > tpf[2] >= 1, "a lower threshold reveals more at once"
    (((read,),),) = compare.read_sweeps([[tmp_path / "out"]]).values()
    assert read.thresholds == [0.9, 0.3, 0.1]
    as_read = frontier.points_of([read], np.ones((1, 12)))
    assert as_read[0][0] == pytest.approx(tpf[::-1]) and as_read[1][0] == pytest.approx(accuracy[::-1])
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = shown
    threshold_accuracy, tpf_accuracy, threshold_tpf, _ = figure.axes
    assert list(threshold_tpf.lines[0].get_ydata()) == tpf
    assert list(threshold_accuracy.lines[0].get_xdata()) == [0.1, 0.3, 0.9]
    assert list(tpf_accuracy.lines[0].get_xdata()) == tpf


# -------------------------------------------------------------------------------- what is never drawn


def test_confidence_is_of_what_is_left_when_tokens_are_banned(tiny_model, tokenizer):
    engine = TorchEngine(tiny_model, 4, tokenizer.mask_token_id, stop_ids(tokenizer))
    vocabulary = tiny_model.config.vocab_size
    everything_but = [i for i in range(vocabulary) if i != 65]
    how = Decoding(threshold=0.999, max_tokens=8, banned_ids=everything_but)
    (rollout,) = engine.generate([[1, 2, 3, 4]], [0], how)
    assert rollout.response_ids == [65] * 8
    assert rollout.steps == [1] * 4 + [2] * 4, "one word is left, so it is certain"
    assert rollout.logprobs == pytest.approx([0.0] * 8, abs=1e-29)
    with pytest.raises(InputError, match="min_tokens=9 is more than max_tokens=8"):
        engine.generate([[1]], [0], Decoding(max_tokens=8, min_tokens=9))


def test_no_answer_is_shorter_than_asked_for(tiny_model, tokenizer):
    stops = list(range(0, 256, 9))
    engine = TorchEngine(tiny_model, 4, tokenizer.mask_token_id, stops)
    prompts = [list(range(1, n + 2)) for n in range(30)]
    for least in (0, 9):
        how = Decoding(top_k=1, threshold=0.4, max_tokens=40, min_tokens=least)
        lengths = [r.num_tokens for r in engine.generate(prompts, list(range(30)), how)]
        assert (min(lengths) < 9) == (least == 0)
        assert any(n < 40 for n in lengths), "stop tokens come back after the least length"


# --------------------------------------------------------------------------------------- no arguments


def test_without_arguments_the_demo_is_evaluated_or_asked_for(folder, tmp_path, zygote):
    def run() -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "evaluate.py")]
        return zygote.run(command, cwd=tmp_path, env=os.environ | SETTINGS, timeout=120)

    done = run()
    assert done.returncode == 2 and done.stdout == ""
    assert "run `make demo` first" in done.stderr and "runs/demo/dipo/latest" in done.stderr
    for place in ("dipo", "data"):
        (tmp_path / "runs" / "demo" / place).mkdir(parents=True)
    (tmp_path / "runs/demo/dipo/latest").symlink_to(folder / "model")
    lines = (folder / "test.jsonl").read_text().splitlines()[:3]
    (tmp_path / "runs/demo/data/test.jsonl").write_text("\n".join(lines))
    done = run()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no arguments: evaluating the demo's checkpoint runs/demo/dipo/latest on")
    assert "| dynamic | 3 | 1 |" in done.stdout
