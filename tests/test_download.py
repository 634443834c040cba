"""Downloads from a folder and from a small hub on this machine, which the real client talks to."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import download
import pytest

from plumbing.common import InputError
from reward import read_questions

SCRIPT = Path(download.__file__)
SHA = "0123456789abcdef0123456789abcdef01234567"

# Rows of our own in the shape of the upstream ones.
MATH500 = {
    "problem": " What is $1+1$? ", "solution": r"It is $\boxed{2}$.", "answer": "2", "subject": "Prealgebra",
    "level": 1, "unique_id": "test/prealgebra/1.json",
}  # fmt: skip
GSM8K = {"question": "Two pens at 9 each?", "answer": "2*9=<<2*9=18>>18\n#### 18"}
AIME24 = {"id": 60, "problem": "Find $n$.", "solution": "So 25.", "answer": "025", "year": "2024"}
AIME25 = {"problem": "Find $m$.", "answer": 70, "id": "0"}
OLYMPIAD = {
    "id": 1,
    "subfield": "Algebra",
    "context": None,
    "question": "Find all $x$.",
    "solution": ["As ..."],
    "final_answer": ["1, 2"],
    "is_multiple_answer": True,
    "unit": None,
    "answer_type": "Numerical",
    "error": None,
    "question_type": "Open-ended",
    "subject": "Math",
    "language": "English",
    "modality": "Text-only",
}


# --------------------------------------------------------------------------------------- converters


def test_converters_of_benchmarks():
    assert download.convert_problem(MATH500) == {"problem": "What is $1+1$?", "answer": "2"}
    assert download.convert_problem(AIME24) == {"problem": "Find $n$.", "answer": "025"}
    assert download.convert_problem(AIME25) == {"problem": "Find $m$.", "answer": "70"}
    assert download.convert_gsm8k(GSM8K) == GSM8K
    row = download.convert_olympiadbench(OLYMPIAD)
    assert set(row) == set(download.OLYMPIAD_FIELDS) and row["final_answer"] == ["1, 2"]


@pytest.mark.parametrize(
    "change",
    [
        {"language": "Chinese"}, {"modality": "Multimodal"}, {"subject": "Physics"},
        {"question_type": "Theorem proof"}, {"final_answer": None}, {"final_answer": []},
    ],
)  # fmt: skip
def test_olympiadbench_leaves_out_what_is_no_english_text_with_an_answer(change):
    assert download.convert_olympiadbench(OLYMPIAD | change) is None


@pytest.mark.parametrize(
    ("row", "converted"),
    [
        ({"question": "q", "ground_truth_answer": "5"}, {"question": "q", "ground_truth_answer": "5"}),
        ({"problem": "q", "answer": 0, "level": 1}, {"question": "q", "ground_truth_answer": "0"}),
    ],
)
def test_converter_of_rl_sets(row, converted):
    assert download.convert_rl(row) == converted


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "converted"),
    [
        ({"messages": [turn | {"id": 1} for turn in TURNS], "source": "x"}, {"messages": TURNS}),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            {"messages": TURNS},
        ),
        ({"prompt": "<|im_start|>", "response": "a", "x": 1}, {"prompt": "<|im_start|>", "response": "a"}),
    ],
)
def test_converter_of_sft_sets(row, converted):
    assert download.convert_sft(row) == converted


@pytest.mark.parametrize("row", [{"problem": "q"}, {"problem": None, "answer": "1"}, 5, ["q"]])
def test_a_row_of_unknown_shape_is_named(tmp_path, row):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([MATH500, row]))
    with pytest.raises(InputError, match=r"rows\.json: row 2"):
        download.convert_file(file, download.convert_problem)


# ------------------------------------------------------------------------------------- from a folder


def write_mirror(root: Path) -> Path:
    files = {
        "HuggingFaceH4/MATH-500/test.jsonl": "".join(json.dumps(MATH500) + "\n" for _ in range(3)),
        "HuggingFaceH4/MATH-500/README.md": "no data",
        "math-ai/aime25/test.jsonl": json.dumps(AIME25),
        "Auraithm/Light-MATH-RL/train.json": json.dumps([{"question": "q", "ground_truth_answer": "5"}] * 2),
        "Auraithm/Light-OpenR1Math-SFT/a.json": json.dumps([{"messages": TURNS}]),
        "JetLM/SDAR-1.7B-Chat/config.json": "{}",
        "JetLM/SDAR-1.7B-Chat/model.safetensors": "weights",
        "JetLM/SDAR-1.7B-Chat/modeling_sdar.py": "code",
        "JetLM/SDAR-1.7B-Chat/pytorch_model.bin": "pickle",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def launch(*arguments, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | environment, check=False
    )


def one_line_error(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr


def test_from_a_folder_to_files_that_the_scripts_read(tmp_path):
    mirror, out = write_mirror(tmp_path / "mirror"), tmp_path / "out"
    names = ["math500", "aime25", "light_math_rl", "light_openr1_math_sft"]
    done = launch("--source", mirror, "--out", out, *names)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.glob("*.json*")) == sorted(
        [*(f"{name}.jsonl" for name in names), "manifest.json"]
    )
    assert [q.gold for q in read_questions(str(out / "math500.jsonl"))] == ["2"] * 3
    assert [q.gold for q in read_questions(str(out / "light_math_rl.jsonl"))] == ["5"] * 2
    assert json.loads((out / "light_openr1_math_sft.jsonl").read_text()) == {"messages": TURNS}
    entry = json.loads((out / "manifest.json").read_text())["math500"]
    assert entry["repo"] == "HuggingFaceH4/MATH-500" and entry["rows"] == 3
    source = (mirror / "HuggingFaceH4/MATH-500/test.jsonl").read_bytes()
    assert entry["upstream"] == {"test.jsonl": hashlib.sha256(source).hexdigest()}
    made = (out / "math500.jsonl").read_bytes()
    assert entry["local"] == {"math500.jsonl": hashlib.sha256(made).hexdigest()}


def test_a_model_comes_without_code_and_pickles(tmp_path):
    out = tmp_path / "out"
    done = launch("--source", write_mirror(tmp_path / "mirror"), "--out", out, "SDAR-1.7B-Chat")
    assert done.returncode == 0, done.stderr
    folder = out / "SDAR-1.7B-Chat"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert set(json.loads((out / "manifest.json").read_text())["SDAR-1.7B-Chat"]["local"]) == {
        "SDAR-1.7B-Chat/config.json",
        "SDAR-1.7B-Chat/model.safetensors",
    }


def test_a_second_fetch_is_held_to_the_manifest(tmp_path):
    mirror, out = write_mirror(tmp_path / "mirror"), tmp_path / "out"
    arguments = ["--source", mirror, "--out", out, "math500"]
    assert launch(*arguments).returncode == 0
    manifest, rows = ((out / name).read_bytes() for name in ("manifest.json", "math500.jsonl"))
    assert "already here" in launch(*arguments).stdout

    (out / "math500.jsonl").write_bytes(rows[:-20])  # spoilt: made again
    assert launch(*arguments).returncode == 0
    assert (out / "math500.jsonl").read_bytes() == rows

    (out / "math500.jsonl").unlink()
    (mirror / "HuggingFaceH4/MATH-500/test.jsonl").write_text(json.dumps(MATH500 | {"answer": "3"}))
    assert "test.jsonl differs from the manifest" in one_line_error(launch(*arguments))
    assert (out / "manifest.json").read_bytes() == manifest and not (out / "math500.jsonl").exists()

    assert launch(*arguments, "--update").returncode == 0
    assert [q.gold for q in read_questions(str(out / "math500.jsonl"))] == ["3"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no_such_set"], ["no_such_set", "math500", "SDAR-8B-Chat"]),
        (["gsm8k", "--source", "{mirror}"], ["openai/gsm8k", "no files"]),
        (["bigmath_rl", "--source", "/nowhere"], ["/nowhere/Auraithm/BigMath-RL"]),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, arguments, words):
    mirror = str(write_mirror(tmp_path / "mirror"))
    done = launch("--out", tmp_path / "out", *(a.replace("{mirror}", mirror) for a in arguments))
    assert all(word in one_line_error(done) for word in words)


def test_a_broken_manifest_is_one_line(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    assert "manifest.json" in one_line_error(launch("--out", tmp_path, "math500"))


def test_without_names_it_lists_them():
    done = launch()
    assert done.returncode == 0
    assert {line.split()[0] for line in done.stdout.splitlines()} == {*download.DATASETS, *download.MODELS}


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = {
        "openai/gsm8k/main/test-00000-of-00001.parquet": [GSM8K] * 2,
        "HuggingFaceH4/aime_2024/data/train-00000-of-00001.parquet": [AIME24],
        "Hothan/OlympiadBench/OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet": [OLYMPIAD],
    }
    for name, content in rows.items():
        (tmp_path / name).parent.mkdir(parents=True)
        parquet.write_table(pyarrow.Table.from_pylist(content), tmp_path / name)
    done = launch("--source", tmp_path, "--out", tmp_path / "out", "gsm8k", "aime24", "olympiadbench")
    assert done.returncode == 0, done.stderr
    golds = {
        name: [q.gold for q in read_questions(str(tmp_path / "out" / f"{name}.jsonl"))]
        for name in ("gsm8k", "aime24", "olympiadbench")
    }
    assert golds == {"gsm8k": ["18", "18"], "aime24": ["025"], "olympiadbench": ["1, 2"]}


# --------------------------------------------------------------------------------------- from a hub


class SmallHub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as its client asks for: what a revision holds, and the files."""

    root: Path
    breaks: list[str]  # files whose next download ends half way
    asked: list[str]

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        path = self.path.partition("?")[0].strip("/").split("/")
        self.asked.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
        if path[:2] == ["api", "datasets"]:
            folder = self.root / "/".join(path[2:4])
            names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
            content = json.dumps(
                {"id": "x", "sha": SHA, "siblings": [{"rfilename": n} for n in names]}
            ).encode()
        else:
            file = self.root / "/".join(path[1:3]) / "/".join(path[5:])
            content = file.read_bytes() if file.is_file() else b""
        if not content:
            self.send_error(404)
            return
        start = 0
        if (wanted := self.headers.get("Range")) and body:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if body and path[-1] in self.breaks:
            self.breaks.remove(path[-1])
            self.wfile.write(content[start : (start + len(content)) // 2])
            self.close_connection = True
        elif body:
            self.wfile.write(content[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    handler = type("Hub", (SmallHub,), {"root": write_mirror(tmp_path / "hub"), "breaks": [], "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.address = f"http://127.0.0.1:{server.server_address[1]}"
    yield handler
    server.shutdown()
    server.server_close()


def test_from_the_hub_by_its_own_client(tmp_path, hub):
    out = tmp_path / "out"
    environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
    done = launch("--out", out, "math500", "light_math_rl", **environment)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "manifest.json").read_text())["math500"]["revision"] == SHA
    assert len(read_questions(str(out / "math500.jsonl"))) == 3
    assert not any("README" in line for line in hub.asked), "only what is needed should be fetched"
    (out / "math500.jsonl").unlink()
    hub.asked.clear()
    assert launch("--out", out, "math500", **environment).returncode == 0
    assert f"GET /api/datasets/HuggingFaceH4/MATH-500/revision/{SHA}" in "\n".join(hub.asked)


def test_a_broken_download_leaves_no_half_file_and_goes_on(tmp_path, hub):
    out = tmp_path / "out"
    rows = [{"question": f"{i}?", "ground_truth_answer": "5"} for i in range(2000)]
    for name in ("train-1.json", "train-2.json"):
        (hub.root / "Auraithm/Light-MATH-RL" / name).write_text(json.dumps(rows))
    (hub.root / "Auraithm/Light-MATH-RL/train.json").unlink()
    hub.breaks += ["train-2.json"] * 50  # more often than the client tries by itself
    environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
    done = launch("--out", out, "light_math_rl", **environment)
    last = done.stderr.splitlines()[-1]  # before it stand the client's own lines about its tries
    assert done.returncode == 2 and "Light-MATH-RL/train-2.json: cannot be fetched" in last
    assert not list(out.rglob("*.jsonl")) and not (out / "manifest.json").exists()
    hub.breaks.clear()
    hub.asked.clear()
    done = launch("--out", out, "light_math_rl", **environment)
    assert done.returncode == 0, done.stderr
    assert len(read_questions(str(out / "light_math_rl.jsonl"))) == 4000
    fetched = [line for line in hub.asked if line.startswith("GET /datasets")]
    assert len(fetched) == 1 and "train-2.json" in fetched[0], "whole files should not come again"


def test_no_network_is_one_line(tmp_path):
    done = launch("--out", tmp_path / "out", "math500", HF_ENDPOINT="http://127.0.0.1:9")
    assert "network" in one_line_error(done) and "MATH-500" in done.stderr
