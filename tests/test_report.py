"""plumbing/report.py: what a report holds, against the files it was made of; hostile text; large runs."""

import base64
import fcntl
import hashlib
import json
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from itertools import accumulate
from pathlib import Path
from statistics import fmean

import pytest
from faults import KEEP_ALL, arguments, install, make_good, run_here, told, works
from report_runs import HOSTILE, Parts, evaluation, read_report, record_of, training_run, write_lines

from plumbing import report, run_folder
from plumbing.common import ROOT, InputError, write_json
from plumbing.report import make_report, spread


def records_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def run_report(*arguments, cwd: Path) -> tuple[int, str]:
    """(exit code, standard error) of the program, in a process of its own."""
    command = [sys.executable, str(ROOT / "plumbing/report.py"), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


# ---------------------------------------------------------------------------- a training run


def test_a_training_run_on_its_page(tiny_folder, tokenizer, tmp_path):
    folder = training_run(tmp_path / "run", tiny_folder, tokenizer=tokenizer)
    assert make_report([folder]) == folder / "report.html"
    data, samples = read_report(folder / "report.html")
    metrics, rollouts = records_of(folder / "metrics.jsonl"), records_of(folder / "rollouts.jsonl")

    # Every number of every curve, with null where there is none.
    curves = dict(data["curves"])
    assert data["steps"] == [m["step"] for m in metrics] and data["per"] == 1
    assert curves.keys() == {n for m in metrics for n in m} - {"step", "skipped"}
    for name, values in curves.items():
        for value, m in zip(values, metrics, strict=True):
            assert value == (None if m.get(name) is None else pytest.approx(m[name], rel=1e-5)), name
    assert curves["loss"][2] is None and curves["eval/accuracy"][:4] == [None, None, None, 0.2]

    # What did not go as planned.
    marks = {(kind, step) for kind, step, _ in data["marks"]}
    assert marks == {("skipped", 3), ("gap", 5), ("groups", 7), ("resume", 8)}
    assert data["counts"] == {"skipped": 1, "gap": 1, "groups": 1, "resume": 1}
    assert data["limits"] == {"max_grad_norm": 1.0, "groups": 8, "gap": 0.01}

    # What the run is.
    fields = {name: (value, default) for name, value, default in data["fields"]}
    assert fields["steps"] == ("12", "100") and fields["lr"] == ("0.001", None)
    assert (data["script"], data["wanted"], data["last"], data["running"]) == ("dipo", 12, 12, False)
    assert data["starts"][-1]["commit"] == "abc" and data["starts"][-1]["step"] == 8

    # Every rollout, in the table and behind it.
    assert [row["step"] for row in data["rows"]] == [r["step"] for r in rollouts]
    for row, r in zip(data["rows"], rollouts, strict=True):
        assert (row["question"], row["gold"], row["answer"]) == (r["question"], r["gold"], r["answer"])
        assert row["flags"] == r["correct"] + 2 * (r["finish_reason"] == "length")
        assert (row["tokens"], row["advantage"]) == (r["num_tokens"], 0.25)
        assert row["tpf"] == pytest.approx(r["tpf"], rel=1e-5)
        check_sample(samples[row["key"]], r, tokenizer)
    assert [samples[row["key"]]["where"] for row in data["rows"]] == [
        f"run/rollouts.jsonl, line {number}" for number in range(1, 25)
    ]
    assert set(data["keys"]) == set(samples) and data["kept"]["count"] == data["kept"]["of"] == 24


def check_sample(found: dict, record: dict, tokenizer=None) -> None:
    """Whether the viewer gets what the record says."""
    assert list(accumulate(found["steps"])) == record["steps"]
    assert found["logprobs"] == pytest.approx(record["logprobs"], abs=1e-4)
    assert found["bounds"] == pytest.approx(record.get("hold_bounds", []), abs=1e-4)
    assert found["held"] == pytest.approx(record.get("hold_logprobs", []), abs=1e-4)
    assert (found["block"], found["prompt"]) == (4, record["prompt_tokens"])
    assert (found["shown"], found["seed"]) == (record["num_tokens"], record["seed"])
    if tokenizer:
        assert len(found["pieces"]) == len(record["steps"])
        assert "".join(found["pieces"]) == tokenizer.decode(record["response_ids"])


def test_curves_of_many_steps_are_means(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [
        {"step": i, "a": i * i, "b": 1.0 if i % 7 == 0 else None} for i in range(1, 2501)
    ])  # fmt: skip
    make_report([tmp_path])
    data, _ = read_report(tmp_path / "report.html")
    curves, groups = dict(data["curves"]), [range(i, min(i + 3, 2501)) for i in range(1, 2501, 3)]
    assert data["per"] == 3 and len(data["steps"]) == len(groups)
    assert data["steps"] == pytest.approx([fmean(g) for g in groups], rel=1e-5)
    assert curves["a"] == pytest.approx([fmean(i * i for i in g) for g in groups], rel=1e-5)
    assert curves["b"] == [1.0 if any(i % 7 == 0 for i in g) else None for g in groups]


@pytest.mark.parametrize("size", [1, 2, 3, 8, 13, 100])
def test_every_beginning_of_the_order_is_spread(size):
    order = spread(size)
    assert sorted(order) == list(range(size))
    for count in range(1, size):
        gaps = sorted([*order[:count], size])
        widest = max(b - a for a, b in zip([0, *gaps], gaps, strict=False))
        assert widest <= 2 ** (size.bit_length() - count.bit_length() + 1)
    assert spread(8) == [0, 4, 2, 6, 1, 5, 3, 7]


def test_characters_of_several_tokens(tiny_folder, tokenizer):
    words = report.Words(["", None, tiny_folder / "nowhere", tiny_folder])
    ids = tokenizer("a\u20acb\U0001f600")["input_ids"]
    assert words.split(ids) == ["a", "", "", "\u20ac", "b", "", "", "", "\U0001f600"]
    assert words.split([]) == []
    for broken in (ids[:3], ids[2:], ids[:6] + ids[8:], [tokenizer.eos_token_id, *ids[:2]]):
        pieces = words.split(broken)
        assert len(pieces) == len(broken) and "".join(pieces) == tokenizer.decode(broken)


# ------------------------------------------------------------------------- runs of the scripts


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A small model and data: tests/faults.py."""
    return make_good(tmp_path_factory.mktemp("good"))


def test_a_run_of_dipo_reports_itself(good, tmp_path, monkeypatch):
    """With the exact likelihood, a step that is skipped, and resumed: all from the files that it wrote."""
    out = tmp_path / "out"
    argv = arguments(good, "dipo", out, "likelihood=exact", "log_rollouts=2", *KEEP_ALL)
    with monkeypatch.context() as patch:
        install("nan_gradient:2", patch.setattr)
        works("dipo", [*argv, "steps=3"])
    works("dipo", [*argv, "steps=4", "resume=true"])
    data, samples = read_report(out / "report.html")
    rollouts, run = records_of(out / "rollouts.jsonl"), json.loads((out / "run.json").read_text())
    assert data["running"] is False and data["last"] == 4 and not data["notes"]
    assert {("skipped", 2), ("resume", 3)} <= {(kind, step) for kind, step, _ in data["marks"]}
    assert [start["step"] for start in run["starts"]] == [0, 3] == [s["step"] for s in data["starts"]]
    changed = {name: default for name, _, default in data["fields"] if default is not None}
    assert changed["likelihood"] == "tokens" and changed["steps"] == "100" and "kl_beta" not in changed
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    assert run["starts"][0]["commit"].split()[0] == head.strip() and run["starts"][0]["machine"]
    assert len(samples) == len(rollouts) == len(data["rows"]) > 0
    for row, record in zip(data["rows"], rollouts, strict=True):
        check_sample(samples[row["key"]], record)
        earlier = 0  # steps of its block before a token's own, of all tokens
        for i, step in enumerate(record["steps"]):
            block = (record["prompt_tokens"] + i) // 4
            of_block = {
                s for j, s in enumerate(record["steps"]) if (record["prompt_tokens"] + j) // 4 == block
            }
            earlier += sum(s < step for s in of_block)
        assert len(samples[row["key"]]["bounds"]) == len(samples[row["key"]]["held"]) == earlier


def test_a_run_of_sft_reports_itself_while_it_goes(good, tmp_path, monkeypatch):
    seen = []
    log = run_folder.RunFolder.log

    def logged(folder, step, metrics):
        log(folder, step, metrics)
        seen.append(read_report(folder.path / "report.html")[0])

    monkeypatch.setattr(run_folder.RunFolder, "log", logged)
    works("sft", arguments(good, "sft", tmp_path / "out"))
    assert seen[0]["running"] and seen[0]["last"] == 1
    data, _ = read_report(tmp_path / "out/report.html")
    assert not data["running"] and data["last"] == len(seen) == 5


def test_a_report_that_cannot_be_made_ends_no_run(good, tmp_path, monkeypatch):
    """Its place is taken by a folder, or its maker is broken: a line each time, and the run goes on."""
    out = tmp_path / "out"
    (out / "report.html" / "full").mkdir(parents=True)
    lines = told(works("sft", arguments(good, "sft", out)))
    assert len(lines) == 2 and all("no report (" in line and "report.html" in line for line in lines)
    assert len(records_of(out / "metrics.jsonl")) == 5 and (out / "latest").exists()

    def broken(*arguments, **options):
        raise RecursionError("deep\nand deeper")

    monkeypatch.setattr(report, "make_report", broken)
    lines = told(works("sft", arguments(good, "sft", tmp_path / "other")))
    assert lines == [f"{tmp_path}/other: no report (RecursionError: deep)"] * 2


def test_an_evaluation_reports_itself(good, tmp_path):
    out = tmp_path / "out"
    works("evaluate", arguments(good, "evaluate", out, "samples=3", "top_k=0"))
    data, samples = read_report(out / "report.html")
    summary = json.loads((out / "summary.json").read_text())["benchmarks"]
    assert {f["rule"] for f in data["figures"]} == {"static", "dynamic"}
    for f in data["figures"]:
        for name, value in summary[f["rule"]][f["benchmark"]].items():
            assert name == "pass_at" or f[name] == pytest.approx(value, rel=1e-5)
    assert len(samples) == 2 * 4 * 3
    (start,) = json.loads((out / "config.json").read_text())["starts"]
    assert (
        start["defaults"]["samples"] == 1 and start["commit"] and start["command"].startswith("evaluate.py")
    )
    for of_file in data["files"]:
        records = records_of(out / f"responses-{of_file['benchmark']}-{of_file['rule']}.jsonl")
        keys = [sample[4] for question in of_file["questions"] for sample in question[4]]
        for key, record in zip(keys, records, strict=True):
            check_sample(samples[key], record)


# ---------------------------------------------------------------------------- evaluations


def test_questions_of_an_evaluation(tiny_folder, tmp_path):
    folder = evaluation(tmp_path / "eval", tiny_folder, questions=9, samples=5)
    make_report([folder])
    data, _ = read_report(folder / "report.html")
    for of_file in data["files"]:
        records = records_of(folder / f"responses-test-{of_file['rule']}.jsonl")
        assert of_file["count"] == len(of_file["questions"]) == 9
        for q, (text, gold, answers, majority_wrong, samples, index) in enumerate(of_file["questions"]):
            own = [r for r in records if r["index"] == q]
            assert (data["texts"][text], gold, index) == (own[0]["question"], "7", q)
            assert [answers[s[0]] for s in samples] == [r["answer"] for r in own]
            assert [s[1] & 1 for s in samples] == [r["correct"] for r in own]
            assert [s[1] >> 1 for s in samples] == [r["finish_reason"] == "length" for r in own]
            assert [s[2] for s in samples] == [r["num_tokens"] for r in own]

            # The commonest answer of those that are complete, the first of equally common ones.
            votes = Counter(r["answer"] for r in own if r["finish_reason"] != "length").most_common()
            right = {r["answer"] for r in own if r["correct"]}
            assert majority_wrong == (not votes or votes[0][0] not in right)
        assert {row[3] for row in of_file["questions"]} == {0, 1}, "both kinds are there"
        for name, values in (("tokens", "num_tokens"), ("tpf", "tpf")):
            bars = of_file["bars"][name]
            assert sum(bars["right"]) == sum(r["correct"] for r in records)
            assert sum(bars["wrong"]) == sum(not r["correct"] for r in records)
            low, high = bars["edges"][3], bars["edges"][4]
            inside = sum(low <= r[values] < high for r in records)
            assert bars["right"][3] + bars["wrong"][3] == inside


def test_two_evaluations(tiny_folder, tmp_path):
    first = evaluation(tmp_path / "a", tiny_folder, samples=2)
    second = evaluation(tmp_path / "b", tiny_folder, samples=2, chance="b", rules=("dynamic",))
    assert make_report([first, second]) == second / "comparison.html"
    data, samples = read_report(second / "comparison.html")
    (part,) = data["parts"]
    shares = []
    for folder in (first, second):
        records = records_of(folder / "responses-test-dynamic.jsonl")
        shares.append([fmean(r["correct"] for r in records if r["index"] == q) for q in range(9)])
    differ = [q for q in range(9) if shares[0][q] != shares[1][q]]
    assert 0 < len(differ) < 9 and part["differ"] == len(differ) and part["count"] == 9
    assert sorted(row[0][5] for row in part["rows"]) == differ
    assert part["accuracy"] == pytest.approx([fmean(of) for of in shares], rel=1e-5)
    assert part["difference"][0] == pytest.approx(fmean(shares[1]) - fmean(shares[0]), rel=1e-5)
    assert all(row[0][5] == row[1][5] for row in part["rows"])
    gaps = [abs(shares[0][row[0][5]] - shares[1][row[0][5]]) for row in part["rows"]]
    assert gaps == sorted(gaps, reverse=True)
    listed = {sample[4] for row in part["rows"] for side in row for sample in side[4]}
    assert listed == set(samples), "of the others no trajectory is kept"


def test_two_evaluations_of_other_questions(tiny_folder, tmp_path):
    first, second = (evaluation(tmp_path / name, tiny_folder, text=name) for name in "ab")
    with pytest.raises(InputError, match="no question of test in common"):
        make_report([first, second])
    other = evaluation(tmp_path / "c", tiny_folder, rules=("static",), name="other")
    with pytest.raises(InputError, match="no benchmark and decoding rule in common"):
        make_report([first, other])


# -------------------------------------------------------------------------------- hostile text


@pytest.fixture(scope="module")
def hostile(tiny_folder, tokenizer, tmp_path_factory) -> dict[str, Path]:
    """Reports of runs that hold HOSTILE wherever a text may be, by kind."""
    place = tmp_path_factory.mktemp("hostile")
    name = HOSTILE.replace("/", "|").replace("\x00", "")[:80]
    run = training_run(place / f"run {name}", tiny_folder, text=HOSTILE, tokenizer=tokenizer)
    for record in (records := records_of(run / "rollouts.jsonl"))[::2]:
        record |= {"response_ids": None, "text": HOSTILE, "finish_reason": HOSTILE, "answer": [HOSTILE]}
    write_lines(run / "rollouts.jsonl", records)
    sides = [
        evaluation(place / f"{side} {name}", tiny_folder, text=HOSTILE, name=f"n {name}", chance=side)
        for side in "ab"
    ]
    return {
        "training": make_report([run]),
        "evaluation": make_report(sides[:1]),
        "comparison": make_report(sides),
    }


def strings(item) -> list[str]:
    """All texts in a JSON value."""
    if isinstance(item, dict):
        return [*item, *strings(list(item.values()))]
    return [s for part in item for s in strings(part)] if isinstance(item, list) else [str(item)]


@pytest.mark.parametrize("kind", ["training", "evaluation", "comparison"])
def test_hostile_text_is_data(hostile, kind):
    written = hostile[kind].read_bytes()
    parts, samples = Parts(written.decode()), read_report(hostile[kind])[1]
    assert Counter(parts.tags) == Counter(
        ["html", "head", *["meta"] * 5, "title", "link", "style", "body", "main", "noscript", "dialog"]
        + ["script"] * (2 + len(samples))
    )
    for name, content in parts.content.items():
        if name not in ("style", "script"):
            assert content.isascii() and not set("<>&") & set(content)
    assert any(HOSTILE in text for text in strings(read_report(hostile[kind])[0])), "whole, not mended"
    texts = {sample["question"] for sample in samples.values()}
    assert texts and all(HOSTILE in text for text in texts)


def test_nothing_but_the_script_may_run(hostile):
    parts = Parts(hostile["training"].read_text())
    policy = dict(part.split(" ", 1) for part in parts.policy.split("; "))
    for kind in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(parts.content[kind].encode()).digest()).decode()
        assert policy[f"{kind}-src"] == f"'sha256-{digest}'"
    assert (policy["default-src"], policy["img-src"]) == ("'none'", "data:")


def test_the_script_makes_text_nodes_only():
    script = (ROOT / "plumbing/report.js").read_text()
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|fetch\(", script
    )


def test_values_of_other_kinds(tiny_folder, tmp_path):
    """Whatever JSON can be stands in some field: the report is made, and the sound line is in it."""
    folder = training_run(tmp_path / "run", tiny_folder, steps=2)
    sound = records_of(folder / "rollouts.jsonl")[0]
    odd = [None, True, -1, 1e308, 10**400, 0.5, "text", [], [[]], {}, {"a": {"b": 1}}, [None], ["x", 1e400]]
    records = [sound] + [sound | {name: value} for name in sound for value in odd]
    write_lines(folder / "rollouts.jsonl", records)
    steps = [{"step": value, "loss": value, "skipped": value, "seconds/train": value} for value in odd]
    write_lines(folder / "metrics.jsonl", steps)
    make_report([folder])
    data, samples = read_report(folder / "report.html")
    check_sample(samples["r-1"], sound)
    assert len(data["rows"]) == len(records) and [s for s in data["steps"] if s == 0.5] == [0.5]
    run = json.loads((folder / "run.json").read_text())
    for name in run:
        for value in odd:
            write_json(folder / "run.json", run | {name: value})
            make_report([folder])


# -------------------------------------------------------------------------------- large folders


def test_a_large_folder(tiny_folder, tmp_path, monkeypatch):
    """The rule of 20 MB at a fiftieth of the size: what is kept, and that it is never in memory at once."""
    folder = evaluation(
        tmp_path / "eval", tiny_folder, questions=700, samples=4, rules=("dynamic",), text="x" * 2000
    )
    file = folder / "responses-test-dynamic.jsonl"
    records = records_of(file)
    for number, record in enumerate(records):  # what does not compress
        record["logprobs"] = [
            -((number * 7919 + i * 104729) % 99991) / 1000 for i in range(len(record["steps"]))
        ]
    write_lines(file, records)
    for name, value in (("FILE_BYTES", 750_000), ("SAMPLE_BYTES", 120_000), ("INDEX_BYTES", 150_000)):
        monkeypatch.setattr(report, name, value)
    tracemalloc.start()
    make_report([folder])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    written = (folder / "report.html").stat().st_size
    data, samples = read_report(folder / "report.html")
    assert 250_000 < written <= 750_000 and peak < file.stat().st_size / 2, (peak, file.stat().st_size)
    assert 0 < len(samples) == data["kept"]["count"] < data["kept"]["of"]
    listed = data["files"][0]["questions"]
    assert 0 < len(listed) < 700 == data["files"][0]["count"]
    assert any(f"the first {len(listed)} of 700 questions" in note for note in data["notes"])

    # Figures are of everything; wrong responses come first, of questions spread over those that are listed.
    bars = data["files"][0]["bars"]["tokens"]
    assert sum(bars["right"]) + sum(bars["wrong"]) == 2800
    kept = [index for _, _, _, _, samples_of, index in listed for s in samples_of if s[4] in samples]
    assert len(kept) > 20 and max(kept) > 0.8 * len(listed) and min(kept) < 0.2 * len(listed)
    assert not any(sample["correct"] for sample in samples.values())


def test_the_order_of_what_is_kept(tiny_folder, tmp_path):
    folder = evaluation(tmp_path / "eval", tiny_folder, questions=3, samples=4, rules=("static",))
    lines = report.evaluation_page(folder).lines
    records = records_of(folder / "responses-test-static.jsonl")
    found = [(records[line.number - 1]["index"], records[line.number - 1]["sample"]) for line in lines]

    # Questions in the order 0 2 1: of each the first wrong response, the first right one, the rest in turn.
    wrong, right, rest = [], [], {}
    for question in (0, 2, 1):
        verdicts = [r["correct"] for r in records if r["index"] == question]
        first = {verdict: verdicts.index(verdict) for verdict in set(verdicts)}
        wrong += [(question, first[False])] if False in first else []
        right += [(question, first[True])] if True in first else []
        for turn, sample in enumerate(s for s in range(4) if s not in first.values()):
            rest.setdefault(turn, []).append((question, sample))
    assert (
        wrong and right and found == wrong + right + [place for turn in sorted(rest) for place in rest[turn]]
    )


def test_many_rollouts_are_listed_evenly(tiny_folder, tmp_path, monkeypatch):
    folder = training_run(tmp_path / "run", tiny_folder, steps=60)
    monkeypatch.setattr(report, "INDEX_BYTES", 8000)
    make_report([folder])
    data, _ = read_report(folder / "report.html")
    numbers = [int(row["key"].removeprefix("r-")) for row in data["rows"]]
    every = numbers[1] - numbers[0]
    assert every > 1 and numbers == list(range(1, 121, every)) and len(json.dumps(data["rows"])) < 12000
    assert f"The table lists every {every}th of 120 rollouts: there is no room for more" in data["notes"]


def test_a_giant_response_is_left_out(tiny_folder, tmp_path, monkeypatch):
    folder = training_run(tmp_path / "run", tiny_folder, steps=2)
    records = records_of(folder / "rollouts.jsonl")
    monkeypatch.setattr(report, "LONGEST", 100)
    records[0] |= {"steps": list(range(1, 102)), "response_ids": [1] * 101, "logprobs": [0.0] * 101}
    write_lines(folder / "rollouts.jsonl", records)
    make_report([folder])
    assert read_report(folder / "report.html")[1].keys() == {"r-2", "r-3", "r-4"}


# ---------------------------------------------------------------- old, broken and running runs


def test_a_run_of_before(tiny_folder, tmp_path):
    """Without token ids, probabilities, block size, starts; its text and its step map are there."""
    folder = training_run(tmp_path / "run", tiny_folder)
    gone = ("response_ids", "logprobs", "hold_bounds", "hold_logprobs", "block_size")
    records = records_of(folder / "rollouts.jsonl")
    write_lines(folder / "rollouts.jsonl", [{k: v for k, v in r.items() if k not in gone} for r in records])
    run = json.loads((folder / "run.json").read_text())
    del run["starts"]
    write_json(folder / "run.json", run)
    make_report([folder])
    data, samples = read_report(folder / "report.html")
    for row, record in zip(data["rows"], records, strict=True):
        sample = samples[row["key"]]
        assert list(accumulate(sample["steps"])) == record["steps"] and sample["text"] == record["text"]
        assert sample["logprobs"] == sample["bounds"] == [] and "pieces" not in sample
        assert sample["block"] == 4, "of the checkpoint that the run began with"
    assert any("older version" in note for note in data["notes"])


def test_without_a_tokenizer(tiny_folder, tmp_path):
    folder = training_run(tmp_path / "run", tmp_path / "gone")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "tokenizer.json").write_text('{"model": 1}')
    make_report([folder])
    data, samples = read_report(folder / "report.html")
    assert "No tokenizer is at hand: responses are shown as text, not token by token" in data["notes"]
    assert all(s["text"].startswith("text ") and s["logprobs"] for s in samples.values())


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl"])
def test_broken_lines_are_counted(tiny_folder, tmp_path, name):
    folder = training_run(tmp_path / "run", tiny_folder)
    lines = (folder / name).read_bytes().splitlines(keepends=True)
    broken = [b"[1]\n", b"\xff\xfe\n", b'{"a": \n', b"[" * 10**5 + b"\n"]
    (folder / name).write_bytes(b"".join(lines[:3] + broken + [b"\n"] + lines[3:]) + b'{"step": 99, "hal')
    make_report([folder])
    data, samples = read_report(folder / "report.html")
    assert f"{name}: 4 lines are no records (the first is line 4)" in data["notes"]
    assert len(data["steps"]) == 12 and len(data["rows"]) == len(samples) == 24


def test_a_run_that_goes_on(tiny_folder, tmp_path):
    folder = training_run(tmp_path / "run", tiny_folder)
    with open(folder / ".lock", "w") as lock:
        make_report([folder])
        assert not read_report(folder / "report.html")[0]["running"]
        fcntl.flock(lock, fcntl.LOCK_EX)
        make_report([folder])
        assert read_report(folder / "report.html")[0]["running"]
    make_report([folder])
    assert not read_report(folder / "report.html")[0]["running"]


def test_a_run_without_steps(tmp_path):
    write_json(tmp_path / "run.json", {"script": "sft"})
    make_report([tmp_path])
    data, samples = read_report(tmp_path / "report.html")
    assert data["steps"] == data["rows"] == [] == list(samples)


# ------------------------------------------------------------------------------ the program


def test_the_program(tiny_folder, tmp_path):
    """From elsewhere, without torch, and without the names of plumbing/ over those of packages."""
    folder = training_run(tmp_path / "run", tiny_folder)
    command = [sys.executable, "-X", "importtime", str(ROOT / "plumbing/report.py"), "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and (folder / "report.html").exists(), done.stderr[-500:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"plumbing.common", "tokenizers"} <= imported
    assert not imported & {"torch", "transformers", "matplotlib", "common", "figures", "kernels"}
    code, said = run_report(folder, "--out", tmp_path / "other.html", cwd=tmp_path)
    assert code == 0 and f"wrote {tmp_path}/other.html" in said and (tmp_path / "other.html").exists()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["empty"], "empty: no run, expected a folder of sft.py or dipo.py"),
        (["missing"], "missing: no run, expected a folder"),
        (["file"], "file: no run, expected a folder"),
        (["demo"], "demo: no run, expected a folder"),
        (["begun"], "begun: an evaluation that is not finished"),
        (["damaged"], "damaged: no finished evaluation"),
        (["run", "eval"], "run: a training run; two are compared if they are evaluations"),
        (["run", "run"], "run: a training run; two are compared if they are evaluations"),
        (["eval"] * 3, "3 folders, expected one, or two to compare"),
        ([""], "an empty name"),
        (["eval", "--out", "nowhere/report.html"], "nowhere/report.html: cannot write it"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_is_no_run_is_one_line(tiny_folder, tmp_path, monkeypatch, capsys, given, wanted):
    monkeypatch.chdir(tmp_path)
    training_run(Path("run"), tiny_folder, steps=1)
    evaluation(Path("eval"), tiny_folder, questions=1)
    for name in ("empty", "demo", "begun", "damaged"):
        Path(name).mkdir()
    Path("file").write_text("")
    write_json(Path("demo/summary.json"), {"commands": []})
    Path("begun/responses-test-static.rank0.jsonl").write_text("")
    for name, content in (("summary.json", "{"), ("config.json", "{}")):
        Path("damaged", name).write_text(content)
    monkeypatch.setattr(sys, "argv", ["report.py", *given])
    with pytest.raises(SystemExit) as end:
        report.run_script(report.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and wanted in line and line.startswith("error: ")


def test_the_program_says_in_one_line_what_is_no_run(tmp_path):
    code, said = run_report(tmp_path, cwd=tmp_path)
    assert code == 2 and said.startswith("error: ") and len(said.splitlines()) == 1


def test_a_response_of_an_older_evaluation_is_gone_on_with(good, tmp_path):
    """Without logprobs it is as good as before; with other ones than numbers it is refused."""
    out = tmp_path / "out"
    argv = arguments(good, "evaluate", out, "rules=[static]")
    works("evaluate", argv)
    (file,) = out.glob("responses-*.jsonl")
    records = records_of(file)
    write_lines(file, [{k: v for k, v in r.items() if k != "logprobs"} for r in records])
    works("evaluate", argv)
    assert all("logprobs" not in r for r in records_of(file)) and read_report(out / "report.html")[1]
    for wrong in (["a"], [0.0], "abc", [float("nan")] * len(records[0]["steps"]), None):
        write_lines(file, [records[0] | {"logprobs": wrong}, *records[1:]])
        code, said = run_here("evaluate", argv)
        assert code == 2 and f"{file.name}:1: not a response (`logprobs` is " in said
    assert len(json.loads((out / "config.json").read_text())["starts"]) >= 2


def test_records_are_rounded_and_flat():
    record = record_of(3)
    for name in ("logprobs", "hold_bounds", "hold_logprobs"):
        assert record[name] and all(float(f"{x:.3e}") == x for x in record[name]), name
    assert len(record["hold_bounds"]) == len(record["hold_logprobs"])
