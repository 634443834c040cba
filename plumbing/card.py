r"""The model card of a checkpoint: README.md, with the front matter that the Hugging Face hub reads.

sft.py and dipo.py write one into every checkpoint. It depends on the run and the step alone, so a run that
was resumed writes the same bytes. The key `nanodirl` of its front matter is what the next stage and a resumed
run read: where the weights came from, the stages so far, the newest evaluation while training.

    python plumbing/card.py runs/dipo/latest runs/eval        # puts the tables of evaluations into the card

What others wrote (names, prompts, values, licences) goes into code spans or YAML, never into plain Markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import re
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # instead of this folder, whose files have common names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from plumbing.common import InputError, first_line, parse_json, printable, run_script, writing
from plumbing.config import Parser, TrainConfig, as_typed, changed_fields
from plumbing.figures import BENCHMARKS
from plumbing.kept import read_settings

Facts = dict[str, Any]
OURS = "<!-- card of a nanodirl checkpoint -->"
BEGIN, END = "<!-- evaluations: begin -->", "<!-- evaluations: end -->"
BASE_CARD = "README.base.md"  # the card of the checkpoint that a run began with
MOST = 2**20  # bytes of a card that is read
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
STAGES = {"sft": "SFT", "dipo": "DiPO"}
LMDEPLOY_MASK = 151669  # of every SDAR model, in LMDeploy 0.18.0 (pytorch/configurations/sdar.py)
SHOWN = {  # of the last step's metrics, in this order
    "loss": "loss", "entropy": "entropy, nats", "reward": "reward", "accuracy": "accuracy of the rollouts",
    "tpf": "their tokens per forward", "response_tokens": "their tokens", "truncation_rate": "truncated",
    "kept_rate": "useful groups", "clip_fraction": "clipped actions", "kl": "KL to the reference",
    "gap_mean": "gap between engine and trainer", "grad_norm": "gradient norm", "lr": "learning rate",
}  # fmt: skip
FIGURES = {
    "questions": "questions", "accuracy": "accuracy", "tpf": "tokens per forward",
    "tokens": "tokens per response", "truncated": "truncated",
}  # fmt: skip
HOW = (  # what of an evaluation's config makes its protocol
    "prompt", "samples", "temperature", "top_k", "top_p", "threshold", "denoising_steps", "max_tokens",
    "min_tokens", "banned", "block_size", "dtype", "limit", "seed",
)  # fmt: skip


# ------------------------------------------------------------------------------- Markdown and YAML


def code(value: Any) -> str:
    """A value as a code span, in which nothing is Markdown or HTML; one line, also in a table."""
    text = printable(" ".join(str(value).split())).replace("|", "\\|").replace("<!--", "<! --") or "-"
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def number(value: float | None) -> str:
    """A figure with four digits; None, which is no number, as a dash."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table of cells that are safe already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


class NoAliases(yaml.SafeDumper):
    """Writes what occurs twice twice, instead of pointing from one to the other."""

    def ignore_aliases(self, data: Any) -> bool:
        """Of all data."""
        return True


def joined(front: dict[str, Any], body: str) -> str:
    """A card: front matter, and the rest."""
    text = yaml.dump(front, Dumper=NoAliases, sort_keys=False, allow_unicode=True, width=10**6)
    return f"---\n{text}---\n{body}"


def split(card: str) -> tuple[dict[str, Any], str]:
    """(front matter, the rest) of a card; without front matter, or with a damaged one: ({}, all of it)."""
    found = re.match(r"---[ \t]*\r?\n(.*?\n)---[ \t]*\r?\n", card, re.DOTALL)
    try:
        front = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, ValueError, RecursionError):  # of others: no reason to end a run
        front = None
    return (front, card[found.end() :]) if isinstance(front, dict) else ({}, card)


def read_card(file: Path) -> str:
    """The text of a card; empty if there is none that can be read."""
    try:
        if file.is_file() and file.stat().st_size <= MOST:
            return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        pass
    return ""


# --------------------------------------------------------------------------- where it came from


def origin(name: str, folder: Path) -> Facts:
    """What is known of the checkpoint that a run begins with, from its card and its name.

    Args:
        name: as config.model has it.
        folder: where it lies; of the path its last parts are told, nothing more.

    Returns:
        name, base_model (its id on the hub, or that of the one it was made from, if known), licence (the
        keys of its card), stages (the runs of this repository that it comes from, the last one its own).
    """
    if name == "tiny":  # made in the run
        return {"name": "tiny (random weights)", "base_model": "", "licence": {}, "stages": []}
    front, _ = split(read_card(folder / "README.md"))
    licence = {}
    for key in ("license", "license_name", "license_link"):
        value = front.get(key)
        if value and (isinstance(value, str) or is_texts(value)):
            licence[key] = value

    # A checkpoint of this repository passes on what it knows; another one is what the hub calls it.
    kept, base_model, stages = front.get("nanodirl"), hub_id(name, folder), []
    if is_facts(kept):
        base_model = base_model or kept["base"]["base_model"]
        stages = [*kept["base"]["stages"], kept["stage"]]
    shown = folder.name
    if re.fullmatch(r"step-\d{6,}", folder.name) and folder.parent.name == "checkpoints":
        shown = f"{folder.parent.parent.name}, {folder.name}"
    elif hub_id(name, folder):
        shown = base_model
    return {"name": shown, "base_model": base_model, "licence": licence, "stages": stages}


def is_texts(value: Any) -> bool:
    """Whether it is a list of texts."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def is_facts(kept: Any) -> bool:
    """Whether the key `nanodirl` of a card is what `Card.text` wrote."""
    try:
        base, data, evaluation = kept["base"], kept["data"], kept["evaluation"]
        texts = [kept["stage"], kept["fingerprint"], base["name"], base["base_model"]]
        texts += [data["name"], data["sha256"], data["repo"], *base["licence"]]
        good = is_texts(texts) and is_texts(base["stages"])
        good &= base["base_model"] == "" or bool(HUB_ID.fullmatch(base["base_model"]))
        good &= all(isinstance(v, str) or is_texts(v) for v in base["licence"].values())
        if evaluation is not None:
            good &= isinstance(evaluation["step"], int) and is_texts([evaluation["how"]])
            good &= set(evaluation["figures"]) == set(FIGURES)
            good &= all(v is None or isinstance(v, int | float) for v in evaluation["figures"].values())
        return good
    except (KeyError, TypeError, AttributeError):
        return False


def hub_id(name: str, folder: Path) -> str:
    """The id on the hub of a model: its name, its folder in the hub's cache, or data/download.py's record."""
    if not Path(name).exists() and HUB_ID.fullmatch(name):
        return name
    for part in folder.parts:  # models--JetLM--SDAR-8B-Chat/snapshots/0123abc
        if found := re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", part):
            return f"{found[1]}/{found[2]}"
    return repo_of(folder.parent, folder.name)


def repo_of(folder: Path, name: str, checksum: str = "") -> str:
    """What data/download.py's manifest in a folder says a file or folder comes from; empty: nothing.

    Args:
        checksum: of a file as it is now; another one than the manifest's is not the same file any more.
    """
    try:
        manifest = parse_json((folder / "manifest.json").read_text(encoding="utf-8"))
        entry = manifest[name.removesuffix(".jsonl")]
        same = not checksum or entry["local"][name] == checksum
        return entry["repo"] if same and HUB_ID.fullmatch(entry["repo"]) else ""
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def settings_of(config: TrainConfig) -> dict[str, str]:
    """The fields that decide a run's result and are not their defaults, as they are typed."""
    found, changed = {}, changed_fields(config)
    for f in dataclasses.fields(config):
        matters = not f.metadata.get("may_change") or (f.name == "steps" and config.schedule != "constant")
        if matters and f.name not in ("model", "data") and f.name in changed:
            found[f.name] = as_typed(getattr(config, f.name))
    return found


def front_matter(base: Facts, dataset: str, script: str) -> dict[str, Any]:
    """What the hub knows how to read."""
    front: dict[str, Any] = {"base_model": base["base_model"]} if base.get("base_model") else {}
    front |= {"datasets": [dataset]} if dataset else {}
    front |= {"library_name": "transformers", "pipeline_tag": "text-generation", **base.get("licence", {})}
    tags = ["block-diffusion", "diffusion-language-model", "sdar", "nanodirl"]
    return front | {"tags": [*tags, script] if script else tags}


# ------------------------------------------------------------------------------- a run's cards


class Card:
    """The card of a run's checkpoints; it sees the run's metrics as they are logged.

    Args:
        config: of sft.py or dipo.py.
        identity: what is in run.json.
        initial: the checkpoint that the run began with; it may be gone when the run is resumed.
        resumed: the checkpoint that the run goes on from, if it is resumed: what its card knows stays.
    """

    def __init__(self, config: TrainConfig, identity: dict[str, Any], initial: Path, resumed: Path | None):
        self._settings, self._lora_rank = settings_of(config), config.lora_rank
        self._script, self._dtype = identity["script"], config.dtype if config.lora_rank else "float32"
        self._forced = [change["step"] for change in identity["forced"]]
        self._last: dict[str, Any] = {}
        count = f"the first {config.eval_limit:,} questions" if config.eval_limit else "all questions"
        self._how = (
            f"{count} of {code(Path(config.eval_data).name)}, one greedy response each (top-k 1), dynamic "
            f"decoding at threshold {config.eval_threshold}, at most {config.eval_max_tokens:,} new tokens, "
            f"prompt {code(as_typed(config.prompt))}, graded by reward.py"
        )

        # What a resumed run knows already is not looked up again, as long as it is the same run.
        front, _ = split(read_card(resumed / "README.md") if resumed else "")
        known = front["nanodirl"] if is_facts(front.get("nanodirl")) else None
        model, data = identity["model"], identity["data"]
        self.facts: Facts = {"evaluation": known["evaluation"] if known else None}
        self.facts["fingerprint"] = model["fingerprint"]
        if known and known["fingerprint"] == model["fingerprint"]:
            self.facts["base"] = known["base"]
        else:
            self.facts["base"] = origin(model["name"], initial)
        if known and known["data"]["sha256"] == data["sha256"]:
            self.facts["data"] = known["data"]
        else:
            file = Path(data["name"])
            repo = repo_of(file.parent, file.name, data["sha256"])
            self.facts["data"] = {"name": file.name, "sha256": data["sha256"], "repo": repo}

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """The metrics of a step, in which None stands for nan and infinity."""
        self._last = {"step": step} | metrics
        if "eval/accuracy" in metrics:
            figures = {name: metrics.get(f"eval/{name}") for name in FIGURES}
            self.facts["evaluation"] = {"step": step, "figures": figures, "how": self._how}

    def text(self, step: int, copied: dict[str, bytes]) -> bytes:
        """The card after a step.

        Args:
            copied: the files that the checkpoint takes over: `plumbing.checkpoint.read_copied`.
        """
        base, data = self.facts["base"], self.facts["data"]
        stage = f"{self._script}.py on {data['name']}, {step:,} steps"
        front = front_matter(base, data["repo"], self._script) | {"nanodirl": {"stage": stage} | self.facts}
        title = (base["base_model"] or base["name"]).rpartition("/")[2]
        parts = [
            OURS,
            f"# {code(title)} after {STAGES[self._script]}, step {step:,}",
            ABOUT,
            "## Training",
            self._story(step, copied),
            *self._measured(step),
            *usage(copied, self._lora_rank > 0, self._dtype),
        ]
        return joined(front, "\n" + "\n\n".join(parts) + "\n").encode()

    def _story(self, step: int, copied: dict[str, bytes]) -> str:
        """Where the weights came from, and the settings: two tables."""
        base, data = self.facts["base"], self.facts["data"]
        rows = [["began with", code(base["name"])]]
        rows += [["made by", code(stage)] for stage in base["stages"]]
        source = f", from the data set {code(data['repo'])}" if data["repo"] else ""
        rows.append(["data", f"{code(data['name'])}{source}, sha256 {code(data['sha256'])}"])
        rows.append(["steps", f"{step:,} of {self._script}.py"])
        rows.append(["tokens per block", number(read_json(copied, "config.json").get("block_size"))])
        what = f"LoRA adapters of rank {self._lora_rank}" if self._lora_rank else "all weights"
        rows.append(["trained", what])
        licence = [code(value) for value in base["licence"].values()]
        rows.append(["licence", ", ".join(licence) or "not known: that of the model it began with"])
        for at in self._forced:
            rows.append(["forced", f"after step {at} it went on as another run (resume=force)"])
        settings = [[code(name), code(value)] for name, value in self._settings.items()] or [["-", "-"]]
        head = ["field that decides the result and is not its default", "value"]
        return f"{table(['', ''], rows)}\n\n{table(head, settings)}"

    def _measured(self, step: int) -> list[str]:
        """Metrics of the last step, and what was evaluated."""
        last = [[name, number(self._last[key])] for key, name in SHOWN.items() if key in self._last]
        parts = []
        if last and self._last["step"] == step:
            parts += [f"## Step {step:,}", table(["metric", "value"], last)]
        parts += ["## Evaluation"]
        if evaluation := self.facts["evaluation"]:
            figures = [[number(evaluation["figures"][name]) for name in FIGURES]]
            parts.append(f"While training, after step {evaluation['step']:,}: {evaluation['how']}.")
            parts.append(table(list(FIGURES.values()), figures))
        else:
            parts.append("Nothing was evaluated while training.")
        return [*parts, MORE]


ABOUT = """A block-diffusion language model: it writes a response block by block, and within a block several
tokens at once where it is sure. Trained with nanodirl, an implementation of DiRL
([arXiv 2512.22234](https://arxiv.org/abs/2512.22234)), from a model of the SDAR family
([2510.06303](https://arxiv.org/abs/2510.06303))."""
MORE = f"""For the tables of other evaluations here (a run folder of evaluate.py each):

```
python plumbing/card.py FOLDER runs/eval
```

{BEGIN}
{END}"""


# --------------------------------------------------------------------------------------- its use


def read_json(copied: dict[str, bytes], name: str) -> dict[str, Any]:
    """An object among the files of a checkpoint; empty if there is none."""
    try:
        found = json.loads(copied[name])
    except (KeyError, ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def mask_token(copied: dict[str, bytes]) -> int | None:
    """The number of the mask token: config.json's, or that of <|MASK|> in the tokenizer's files."""
    numbers = {}
    for token in read_json(copied, "tokenizer.json").get("added_tokens") or []:
        numbers[token.get("content")] = token.get("id")
    decoder = read_json(copied, "tokenizer_config.json").get("added_tokens_decoder") or {}
    for id_, token in decoder.items():
        numbers.setdefault(token.get("content"), int(id_))
    return read_json(copied, "config.json").get("mask_token_id", numbers.get("<|MASK|>"))


def usage(copied: dict[str, bytes], lora: bool = False, dtype: str = "") -> list[str]:
    """How to load a checkpoint, what its folder holds, how to publish it, and with what it was made.

    Args:
        lora: whether adapters were trained.
        dtype: of the weights, if known.
    """
    # What AutoModelForCausalLM would need.
    config, scripts = read_json(copied, "config.json"), [name for name in copied if name.endswith(".py")]
    remote = "`AutoModelForCausalLM` does not know this model type, and no code for it is in this folder."
    if config.get("auto_map") and not scripts:
        remote = "`AutoModelForCausalLM` needs the original's own code, which is not in this folder."
    elif config.get("auto_map"):
        names = ", ".join(map(code, sorted(scripts)))
        remote = (
            f"The original's own code is here as it was ({names}). nanodirl never runs it; read it before "
        )
        remote += "`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)` does."

    # The lines to copy.
    size, mask = config.get("block_size") or 4, mask_token(copied)
    moe = config.get("model_type") == "sdar_moe"
    names = {"network": "Qwen3Moe", "twin": "qwen3_moe", "family": "sdar_moe"} if moe else DENSE
    lines = TRANSFORMERS.format(size=size, mask=mask, **names)
    served = (
        f"LMDeploy takes token {LMDEPLOY_MASK} for the mask of every model of this family (0.18.0), and here "
    )
    served += (
        f"it is token {mask}: by itself it would write nonsense; nanodirl's engine=lmdeploy corrects it."
    )
    if mask == LMDEPLOY_MASK:
        served = f"0.18.0, on a GPU:\n\n```python\n{LMDEPLOY.format(size=size, **names)}```"

    # The files, and how they get to the hub.
    merged = ", with the adapters' products added" if lora else ""
    files = [f"- `model*.safetensors`: the weights{f', in {dtype}' if dtype else ''}{merged}", COPIED]
    files += [f"- `{BASE_CARD}`: the card of the original"] if BASE_CARD in copied else []
    files += (
        ["- `adapters.safetensors`: the adapters alone, to go on training (not peft's format)"]
        if lora
        else []
    )
    files += ["- `optimizer*.safetensors`, `state.json`: to go on training"]
    made = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "safetensors")]
    return [
        "## Use",
        f"### transformers\n\nThe network is {names['network']} of transformers; who sees whom is "
        "different, and the order of decoding. Plain, and slow, since nothing is cached:",
        f"```python\n{lines}```",
        remote,
        f"### LMDeploy\n\n{served}",
        f"### nanodirl\n\nIn a clone of the repository:\n\n```\n{CLONE}```",
        "## Files\n\n" + "\n".join(files),
        f"To publish what others need of it:\n\n```\n{PUBLISH}```",
        f"Written with {', '.join(made)}.",
    ]


DENSE = {"network": "Qwen3", "twin": "qwen3", "family": "sdar"}
COPIED = (
    "- `config.json` (with a block_size, if it had none), tokenizer, code, licences: of the checkpoint that "
    "the run began with"
)
CLONE = """python rollout.py FOLDER 'What is 12 * 7?'      # a response, step by step
python evaluate.py model=FOLDER data=math500 protocol=dirl
python dipo.py model=FOLDER data=data/hub/bigmath_rl.jsonl
"""
PUBLISH = "hf upload OWNER/NAME FOLDER --exclude 'optimizer*' --exclude state.json --exclude 'adapters*'\n"
TRANSFORMERS = """import torch
from transformers import AutoTokenizer, {network}Config, {network}ForCausalLM

folder = "FOLDER"  # this one, or its name on the hub
config = {network}Config.from_pretrained(folder)
config.model_type = "{twin}"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {network}ForCausalLM.from_pretrained(folder, config=config, dtype="auto", attn_implementation="sdpa")
B, MASK = {size}, {mask}  # tokens per block, and the token that stands for those not known yet

chat = [{{"role": "user", "content": "What is 12 * 7?"}}]
text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
ids = tokenizer(text, add_special_tokens=False)["input_ids"]
prompt, ends = len(ids), set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
while len(ids) - prompt < 256 and not ends & set(ids[prompt:]):
    unknown = list(range(len(ids), len(ids) // B * B + B))  # the rest of the block
    ids += [MASK] * len(unknown)
    block = torch.arange(len(ids)) // B
    seen = (block[:, None] >= block[None, :])[None, None]  # a token sees its own block and all earlier ones
    while unknown:
        with torch.no_grad():
            logits = model(torch.tensor([ids]), attention_mask=seen).logits[0, unknown]
        confidence, token = logits.float().softmax(-1).max(-1)
        sure = confidence >= min(0.9, float(confidence.max()))  # at least the most confident one
        for i, t in zip(torch.tensor(unknown)[sure].tolist(), token[sure].tolist()):
            ids[i] = t
            unknown.remove(i)
first_end = next((n for n, i in enumerate(ids[prompt:]) if i in ends), len(ids))
print(tokenizer.decode(ids[prompt : prompt + first_end]))
"""
LMDEPLOY = """from lmdeploy import GenerationConfig, PytorchEngineConfig, pipeline
from transformers import AutoConfig, {network}Config


class SDARConfig({network}Config):  # so that no code of others has to be run
    model_type = "{family}"


AutoConfig.register("{family}", SDARConfig)
engine = PytorchEngineConfig(
    dtype="bfloat16",
    dllm_block_length={size},
    dllm_denoising_steps={size},
    dllm_unmasking_strategy="low_confidence_dynamic",
    dllm_confidence_threshold=0.9,
    enable_metrics=False,
)
pipe = pipeline("FOLDER", backend_config=engine)
print(pipe("What is 12 * 7?", gen_config=GenerationConfig(max_new_tokens=512, do_sample=False)).text)
"""


# --------------------------------------------------------------------------- tables of evaluations


def read_evaluation(checkpoint: Path, run: Path) -> dict[str, Any]:
    """summary.json of a finished evaluation of this checkpoint.

    Raises:
        InputError: it is not finished, damaged, or of other weights.
    """
    if not (run / "summary.json").is_file():
        raise InputError(f"{run}: no finished evaluation (no summary.json)")
    settings = read_settings(run / "config.json")
    files = sorted(checkpoint.glob("model*.safetensors"))
    here = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]  # as evaluate.py notes them
    if not here or settings.get("weights") != here:
        raise InputError(
            f"{run}: an evaluation of {settings.get('model')}, whose weights are not those of {checkpoint} "
            "(name, size and time of every file)"
        )
    try:
        summary = parse_json((run / "summary.json").read_text(encoding="utf-8"))
        evaluation_table(summary), model_index("", [summary])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{run}/summary.json: damaged ({first_line(error)})") from error
    return summary


def evaluation_table(summary: dict[str, Any]) -> str:
    """The protocol of an evaluation, and its figures."""
    config, rows = summary["config"], []
    for rule, benchmarks in summary["benchmarks"].items():
        for name, f in benchmarks.items():
            low, high, accuracy = (100 * f[key] for key in ("accuracy_low", "accuracy_high", "accuracy"))
            row = [code(name), code(rule), f"{f['questions']:,}", f"{f['samples']:,}", f"{accuracy:.1f} %"]
            row += [f"{low:.1f} to {high:.1f}", f"{100 * f['pass_at_k']:.1f} %", f"{f['tpf']:.2f}"]
            rows.append([*row, f"{f['tokens']:.1f}", f"{100 * f['truncated']:.1f} %"])
    how = ", ".join(code(f"{name}={as_typed(config[name])}") for name in HOW if name in config)
    head = [
        "benchmark",
        "decoding",
        "questions",
        "k",
        "mean@k",
        "95 %",
        "pass@k",
        "TPF",
        "tokens",
        "truncated",
    ]
    return (
        f"nanodirl's evaluate.py, protocol {code(config['protocol'])}: {how}.\n\n{table(head, rows)}\n\n"
        "95 %: of mean@k, bootstrap over the questions. TPF: tokens per forward. Truncated: counted as wrong."
    )


def model_index(title: str, summaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures as the hub's front matter has them, accuracies in per cent."""
    results = []
    for summary in summaries:
        for rule, benchmarks in summary["benchmarks"].items():
            for name, f in benchmarks.items():
                what = f"mean@{f['samples']}, {rule}, protocol {summary['config']['protocol']}"
                results.append(
                    EvalResult(
                        task_type="text-generation",
                        dataset_type=re.sub(r"[^\w.-]", "-", name),
                        dataset_name=BENCHMARKS.get(name, printable(name)),
                        metric_type="accuracy",
                        metric_name=printable(what),
                        metric_value=round(100 * f["accuracy"], 2),
                    )
                )
    return eval_results_to_model_index(title, results)


def short_card(checkpoint: Path) -> str:
    """For a checkpoint that has no card: what can be seen in its folder."""
    copied = {}
    for file in checkpoint.iterdir():
        if file.is_file() and file.suffix in (".json", ".py"):
            copied[file.name] = file.read_bytes()
    folder = checkpoint.resolve()
    title, marks = code(hub_id(str(folder), folder) or folder.name), f"{BEGIN}\n{END}"
    parts = [OURS, f"# {title}", ABOUT, "## Evaluation", marks, *usage(copied)]
    return joined(front_matter({}, "", ""), "\n" + "\n\n".join(parts) + "\n")


def add_evaluations(checkpoint: Path, runs: list[Path]) -> None:
    """Put the tables of evaluations into the card of a checkpoint, in place of those that are there.

    Everything else in the card stays, whoever wrote it; a card without our marks gets a section at its end.

    Raises:
        InputError: no checkpoint, no finished evaluation, or one of other weights.
    """
    if not (checkpoint / "config.json").is_file():
        raise InputError(f"{checkpoint}: no checkpoint (no config.json)")
    summaries = [read_evaluation(checkpoint, run) for run in runs]
    old = read_card(checkpoint / "README.md")
    if not old and (checkpoint / "README.md").exists():
        raise InputError(f"{checkpoint}/README.md: expected a text of at most {MOST:,} bytes")

    # The tables stand between the marks.
    front, body = split(old or short_card(checkpoint))
    if BEGIN not in body or END not in body.rpartition(BEGIN)[2]:
        body = f"{body.rstrip()}\n\n## Evaluation\n\n{BEGIN}\n{END}\n"
    before, _, rest = body.rpartition(BEGIN)
    gap = "\n\n" if summaries else "\n"
    tables = gap.join([BEGIN, *map(evaluation_table, summaries), END])
    body = before + tables + rest.partition(END)[2]

    # The figures stand in the front matter too.
    front.pop("model-index", None)
    if summaries:
        heading = re.search(r"^# (.+)$", body, re.MULTILINE)
        title = heading[1].replace("`", "") if heading else checkpoint.resolve().name
        front["model-index"] = model_index(title, summaries)
    part = checkpoint / "README.md.part"
    with writing(part):
        part.write_text(joined(front, body), encoding="utf-8")
        part.replace(checkpoint / "README.md")


def main() -> None:
    """Put tables of evaluations into a card."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint")
    parser.add_argument(
        "runs", nargs="*", type=Path, help="run folders of evaluate.py; none: take tables out"
    )
    options = parser.parse_args()
    add_evaluations(options.checkpoint, options.runs)
    print(f"wrote {printable(str(options.checkpoint / 'README.md'))}")


if __name__ == "__main__":
    run_script(main)
