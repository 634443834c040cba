r"""Benchmarks, training sets and models from the Hugging Face hub, in the form that the scripts read.

    python data/download.py math500 gsm8k aime24 aime25 olympiadbench
    python data/download.py --out /scratch/hub bigmath_rl SDAR-8B-Chat
    python data/download.py --source /mnt/mirror math500     # no hub: files of /mnt/mirror/OWNER/REPO
    python data/download.py                                  # lists what there is

Rows go to OUT/NAME.jsonl, models to OUT/NAME/. OUT/manifest.json keeps, for each name, the hub's
revision and the sha256 of every file that was fetched and of the rows made from them. A later fetch
asks for that revision and must get those bytes, on any machine that has the manifest; `--update`
takes the newest revision instead. A file has its name only when it is whole, and an interrupted run
goes on with the first file that is not.

Left out on purpose: the `datasets` package (a few JSON and parquet files need no library that caches
and executes), and weights that are pickles.
"""

import argparse
import contextlib
import fnmatch
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plumbing.answers import gold_answer
from plumbing.common import InputError, parse_json, read_records, run_script
from plumbing.config import Parser, folder_name

Row = dict[str, Any]
ROWS = ("*.json", "*.jsonl", "*.parquet")


# --------------------------------------------------------------------------------------- converters


def answer_text(answer: Any) -> str:
    """An answer as text.

    Raises:
        ValueError: it is none, such as null.
    """
    if not gold_answer({"answer": answer}):
        raise ValueError(f"no answer: {answer!r}")
    return str(answer).strip()


def convert_problem(row: Row) -> Row:
    """MATH500, AIME: `problem` and `answer` of rows that also hold solutions and sources."""
    if not row["problem"].strip():
        raise ValueError("no question")
    return {"problem": row["problem"].strip(), "answer": answer_text(row["answer"])}


def convert_gsm8k(row: Row) -> Row:
    """GSM8K: the worked answer stays, its last line is `#### 18`."""
    if "####" not in row["answer"]:
        raise ValueError("`answer` has no line ####")
    return {"question": row["question"].strip(), "answer": row["answer"].strip()}


OLYMPIAD_FIELDS = (
    "id", "subfield", "context", "question", "final_answer",
    "is_multiple_answer", "unit", "answer_type", "error",
)  # fmt: skip


def convert_olympiadbench(row: Row) -> Row | None:
    """OlympiadBench: English, text only, open-ended mathematics with a final answer; else None."""
    wanted = {
        "language": "English",
        "modality": "Text-only",
        "subject": "Math",
        "question_type": "Open-ended",
    }
    if any(row.get(name, value) != value for name, value in wanted.items()) or not row.get("final_answer"):
        return None
    return {name: row[name] for name in OLYMPIAD_FIELDS}


def convert_rl(row: Row) -> Row:
    """RL sets: `question` and `ground_truth_answer`, also where they have other names."""
    question = next(row[name] for name in ("question", "problem", "prompt") if row.get(name))
    names = ("ground_truth_answer", "answer", "solution")
    answer = next(row[name] for name in names if row.get(name) is not None)
    if not isinstance(question, str):
        raise ValueError("the question is no text")
    return {"question": question, "ground_truth_answer": answer_text(answer)}


def convert_sft(row: Row) -> Row:
    """SFT sets: `messages`, or `prompt` and `response` verbatim; see data/README.md."""
    if "messages" in row:
        return {"messages": [{"role": m["role"], "content": m["content"]} for m in row["messages"]]}
    if "conversations" in row:
        roles = {"human": "user", "gpt": "assistant", "system": "system"}
        return {"messages": [{"role": roles[m["from"]], "content": m["value"]} for m in row["conversations"]]}
    return {"prompt": row["prompt"], "response": row["response"]}


class Dataset(NamedTuple):
    """Where a data set is and how its rows become ours."""

    repo: str
    files: tuple[str, ...]  # patterns of the repository's files to read
    convert: Callable[[Row], Row | None]
    what: str


DATASETS = {
    "math500": Dataset("HuggingFaceH4/MATH-500", ("test.jsonl",), convert_problem, "500 questions"),
    "gsm8k": Dataset("openai/gsm8k", ("main/test-*.parquet",), convert_gsm8k, "1,319 questions"),
    "aime24": Dataset("HuggingFaceH4/aime_2024", ("data/train-*.parquet",), convert_problem, "30 questions"),
    "aime25": Dataset("math-ai/aime25", ("test.jsonl",), convert_problem, "30 questions"),
    "olympiadbench": Dataset(
        "Hothan/OlympiadBench", ("*/OE_TO_maths_en_COMP.parquet",), convert_olympiadbench, "674 questions"
    ),
    "light_openr1_math_sft": Dataset("Auraithm/Light-OpenR1Math-SFT", ROWS, convert_sft, "SFT, about 2,000"),
    "glm46_openr1_math_sft": Dataset("Auraithm/GLM4.6-OpenR1Math-SFT", ROWS, convert_sft, "SFT"),
    "light_math_rl": Dataset("Auraithm/Light-MATH-RL", ROWS, convert_rl, "RL, about 4,000"),
    "bigmath_rl": Dataset("Auraithm/BigMath-RL", ROWS, convert_rl, "RL"),
}
MODELS = {
    "SDAR-1.7B-Chat": "JetLM/SDAR-1.7B-Chat",
    "SDAR-4B-Chat": "JetLM/SDAR-4B-Chat",
    "SDAR-8B-Chat": "JetLM/SDAR-8B-Chat",
    "SDAR-8B-Chat-b32": "JetLM/SDAR-8B-Chat-b32",
    "DiRL-8B-Instruct": "OpenMOSS-Team/DiRL-8B-Instruct",
}
MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.md", "LICENSE*")  # no code, no pickles


def read_upstream(path: Path) -> list[tuple[str, Row]]:
    """(where, row) pairs of a JSON list, JSON Lines or parquet file.

    Raises:
        InputError: a malformed file, or no package that reads it.
    """
    if path.suffix != ".parquet":
        return read_records(path)
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path.name} is a parquet file: pip install pyarrow") from error
    rows = parquet.read_table(path).to_pylist()
    return [(f"{path}: row {i + 1}", row) for i, row in enumerate(rows)]


def convert_file(path: Path, convert: Callable[[Row], Row | None]) -> list[Row]:
    """The rows of one upstream file in our form.

    Raises:
        InputError: a row has not the shape the converter knows.
    """
    rows = []
    for where, row in read_upstream(path):
        try:
            rows.append(convert(row))
        except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
            raise InputError(f"{where}: an unknown shape ({', '.join(row)}): {error!r}") from error
    return [row for row in rows if row is not None]


# ------------------------------------------------------------------------------------------ sources


class Source(Protocol):
    """Where repositories come from. `kind` is "dataset" or "model"."""

    def look_up(self, repo: str, kind: str, revision: str | None) -> tuple[str, list[str]]:
        """The revision (the newest if None is asked for) and the names of its files."""

    def fetch(self, repo: str, kind: str, revision: str, name: str, folder: Path) -> Path:
        """The path of one file, put under `folder`."""


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """The client's many errors, from no network to no such repository, as one of ours."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(f"{what}: cannot be fetched; is there a network? ({reason})") from error


class Hub:
    """The Hugging Face hub, or what HF_ENDPOINT names. Its client keeps the files it has fetched."""

    def look_up(self, repo: str, kind: str, revision: str | None) -> tuple[str, list[str]]:
        from huggingface_hub import HfApi

        with one_line(repo):
            info = HfApi().repo_info(repo, repo_type=kind, revision=revision)
        return info.sha, [file.rfilename for file in info.siblings]

    def fetch(self, repo: str, kind: str, revision: str, name: str, folder: Path) -> Path:
        from huggingface_hub import hf_hub_download

        with one_line(f"{repo}/{name}"):
            return Path(hf_hub_download(repo, name, repo_type=kind, revision=revision, local_dir=folder))


class Mirror(NamedTuple):
    """A folder with one folder OWNER/REPO per repository; it has no revisions."""

    root: Path

    def look_up(self, repo: str, kind: str, revision: str | None) -> tuple[str, list[str]]:
        files = (path for path in (self.root / repo).rglob("*") if path.is_file())
        names = sorted(path.relative_to(self.root / repo).as_posix() for path in files)
        if not names:
            raise InputError(f"{self.root / repo}: no files")
        return revision or "mirror", names

    def fetch(self, repo: str, kind: str, revision: str, name: str, folder: Path) -> Path:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        shutil.copyfile(self.root / repo / name, part)
        part.replace(target)
        return target


# ----------------------------------------------------------------------------------------- download


def sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Write under another name, then rename."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", newline="\n")
    part.replace(path)


def is_complete(entry: dict | None, folder: Path) -> bool:
    """Whether everything that the manifest lists for a name is there, byte for byte."""
    files = (entry or {}).get("local", {})
    return bool(files) and all(
        (folder / name).is_file() and sha256(folder / name) == checksum for name, checksum in files.items()
    )


def download(name: str, folder: Path, source: Source, entry: dict | None = None) -> dict:
    """Fetch one data set or model into `folder` and return its entry for the manifest.

    Args:
        entry: what an earlier fetch wrote there; this one is held to it.

    Raises:
        InputError: unknown shape, no such files, or bytes other than the entry's.
    """
    dataset = DATASETS.get(name)
    repo, kind = (dataset.repo, "dataset") if dataset else (MODELS[name], "model")
    revision, names = source.look_up(repo, kind, entry and entry["revision"])
    patterns = dataset.files if dataset else MODEL_FILES
    wanted = sorted(n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in patterns))
    if not wanted:
        raise InputError(f"{repo}: no file {' or '.join(patterns)} (it has {', '.join(sorted(names)[:8])})")
    target = folder / ".upstream" / name if dataset else folder / name
    paths = {n: source.fetch(repo, kind, revision, n, target) for n in wanted}
    upstream = {n: sha256(path) for n, path in paths.items()}
    if entry and upstream != entry["upstream"]:
        changed = sorted(
            n for n in {*upstream, *entry["upstream"]} if upstream.get(n) != entry["upstream"].get(n)
        )
        raise InputError(f"{name}: {', '.join(changed)} differs from the manifest; --update accepts it")
    if not dataset:
        local = {f"{name}/{n}": checksum for n, checksum in upstream.items()}
        return {"repo": repo, "revision": revision, "upstream": upstream, "local": local}
    rows = [row for path in paths.values() for row in convert_file(path, dataset.convert)]
    if not rows:
        raise InputError(f"{name}: no rows left in {', '.join(wanted)}")
    made = folder / f"{name}.jsonl"
    write_whole(made, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    shutil.rmtree(target)
    local = {made.name: sha256(made)}
    return {"repo": repo, "revision": revision, "rows": len(rows), "upstream": upstream, "local": local}


def read_manifest(folder: Path) -> dict[str, dict]:
    """The manifest of a folder; empty if there is none.

    Raises:
        InputError: it is damaged.
    """
    path = folder / "manifest.json"
    if not path.exists():
        return {}
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"))
        for entry in manifest.values():
            entry["repo"] + entry["revision"], entry["upstream"].items(), entry["local"].items()
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not what this program wrote ({error}); remove it") from error
    return manifest


def download_all(names: Iterable[str], folder: Path, source: Source, update: bool = False) -> None:
    """Fetch what is missing; the manifest is written after each name, so that nothing is done twice."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(folder)
    for name in names:
        entry = None if update else manifest.get(name)
        if is_complete(entry, folder):
            print(f"{name}: already here, as in the manifest")
            continue
        manifest[name] = download(name, folder, source, entry)
        write_whole(folder / "manifest.json", json.dumps(manifest, indent=2, sort_keys=True) + "\n")
        rows = f"{manifest[name]['rows']} rows of " if "rows" in manifest[name] else ""
        print(f"{name}: {rows}{manifest[name]['repo']} at {manifest[name]['revision'][:12]}")


def main(argv: list[str] | None = None) -> None:
    """Download what the command line names."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="data sets and models; none: list them")
    parser.add_argument("--out", type=folder_name, default=Path("data/hub"), help="folder (default data/hub)")
    parser.add_argument("--source", type=folder_name, help="a folder in place of the hub")
    parser.add_argument("--update", action="store_true", help="take the newest revision, not the manifest's")
    options = parser.parse_args(argv)
    if not options.names:
        for name, dataset in DATASETS.items():
            print(f"{name:24}{dataset.repo} ({dataset.what})")
        for name, repo in MODELS.items():
            print(f"{name:24}{repo} (model)")
    for name in options.names:
        if name not in DATASETS and name not in MODELS:
            parser.error(f"unknown name {name!r}; there are {', '.join([*DATASETS, *MODELS])}")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    source = Mirror(options.source) if options.source else Hub()
    download_all(options.names, options.out, source, options.update)


if __name__ == "__main__":
    run_script(main)
