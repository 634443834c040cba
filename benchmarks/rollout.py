"""Rollout engines side by side: tokens per second, and seconds per weight update.

    LMDeployEngine        ours: the step map, log-probabilities and hold bounds recorded
    LMDeploy's pipeline   as published, the same prompts and settings, nothing recorded
    TorchEngine           embedded

Weights are random in the shape of a published model, so nothing is downloaded; a tiny model on a CPU
(where LMDeploy runs on the stand-ins of tests/lmdeploy_on_cpu.py, and the figures mean nothing). Static
decoding, two tokens per step, no stop word: every request is the same work. Each engine has a process
of its own, one after the other; it answers all requests once to warm up, then `--repeats` times.

    python benchmarks/rollout.py                                             # tiny on a CPU
    python benchmarks/rollout.py --shape 1.7B --requests 64 256 --tokens 512 2048
    python benchmarks/rollout.py --shape 8B --requests 64 256 --tokens 1024 --engines ours pipeline
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoConfig  # noqa: E402

import model  # noqa: E402
from plumbing.checkpoint import load_tokenizer, tiny  # noqa: E402
from plumbing.common import run_script, write_json  # noqa: E402
from plumbing.config import Parser  # noqa: E402
from rollout import Decoding, LMDeployEngine, TorchEngine  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

CUDA = torch.cuda.is_available()
PUBLISHED = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936, "rope_theta": 1e6}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "1.7B": PUBLISHED
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "8B": PUBLISHED
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
}
PROMPT_TOKENS, BLOCK = 128, 4
RULE = {"rule": "static", "denoising_steps": 2}


def write_checkpoint(folder: Path, shape: dict[str, Any]) -> None:
    """A checkpoint with random bfloat16 weights of that shape."""
    tiny(folder)  # config.json and tokenizer
    config = json.loads((folder / "config.json").read_text()) | shape | {"torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        network = model.SDARForCausalLM(AutoConfig.from_pretrained(folder))
    device, tensors = "cuda" if CUDA else "cpu", {}
    for name, parameter in network.named_parameters():
        value = torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
        tensors[name] = (value if value.dim() == 1 else value.normal_(std=0.02)).cpu()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def timed(answer: Callable[[], int], repeats: int) -> dict[str, float]:
    """Tokens per second (median) of a function that returns how many tokens it made."""
    answer()
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        tokens = answer()
        rates.append(tokens / (time.perf_counter() - start))
    return {"tokens_per_second": statistics.median(rates), "lowest": min(rates), "highest": max(rates)}


def measure(engine: str, folder: Path, requests: int, tokens: int, repeats: int) -> dict[str, float]:
    """Run one engine in this process (LMDeployEngine: in its own) and time it."""
    tokenizer = load_tokenizer(str(folder))
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 256, (requests, PROMPT_TOKENS), generator=generator).tolist()
    how = Decoding(max_tokens=tokens, **RULE)
    dtype = "bfloat16" if CUDA else "float32"
    if engine == "pipeline":
        return timed(pipeline(folder, tokenizer, prompts, tokens, dtype), repeats)
    if engine == "torch":
        network = model.load(str(folder), getattr(torch, dtype), "cuda" if CUDA else "cpu")
        ours = TorchEngine(network, BLOCK, tokenizer.mask_token_id, [], requests)
    else:
        ours = LMDeployEngine(
            str(folder), BLOCK, tokenizer.mask_token_id, [], requests, dtype, log=folder / "engine.log"
        )

    def answer() -> int:
        rollouts = ours.generate(prompts, list(range(requests)), how)
        return sum(r.num_tokens for r in rollouts)

    figures = timed(answer, repeats)
    if engine == "ours":
        network = model.load(str(folder), getattr(torch, dtype), "cuda" if CUDA else "cpu")
        size = sum(p.numel() * p.element_size() for p in network.parameters()) / 1e9
        seconds = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            ours.update_weights(network.named_parameters())
            seconds.append(time.perf_counter() - start)
        figures |= {"update_seconds_per_gb": statistics.median(seconds[1:]) / size, "weights_gb": size}
        start = time.perf_counter()
        figures["gib_given_back"] = ours.sleep() / 2**30
        figures["sleep_seconds"] = time.perf_counter() - start
    ours.close()
    return figures


def pipeline(folder: Path, tokenizer, prompts: list[list[int]], tokens: int, dtype: str) -> Callable[[], int]:
    """LMDeploy's own entry, unpatched except for the mask token of the small vocabulary."""
    from lmdeploy import GenerationConfig, PytorchEngineConfig, pipeline

    from plumbing import lmdeploy_child

    lmdeploy_child.use_mask_id(tokenizer.mask_token_id)
    config = PytorchEngineConfig(
        dtype=dtype, max_batch_size=len(prompts), cache_max_entry_count=0.4 if CUDA else 0.1,
        dllm_block_length=BLOCK, dllm_denoising_steps=2, dllm_unmasking_strategy="low_confidence_static",
        distributed_executor_backend="uni", enable_metrics=False,
    )  # fmt: skip
    pipe = pipeline(str(folder), backend_config=config, log_level="ERROR")
    texts = [tokenizer.decode(p) for p in prompts]
    how = [
        GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=True, top_k=0, random_seed=i)
        for i in range(len(prompts))
    ]

    def answer() -> int:
        out = pipe(texts, gen_config=how, do_preprocess=False, use_tqdm=False)
        return sum(o.generate_token_len for o in out)

    return answer


def use_stand_ins() -> None:
    """Without CUDA: LMDeploy's subprocesses run on the stand-ins of tests/lmdeploy_on_cpu.py."""
    os.environ["LMDEPLOY_ENABLE_CHECK_ENV"] = "0"
    if not CUDA:
        LMDeployEngine.setup = "lmdeploy_on_cpu:install"
        places = [str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, places))


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--requests", type=int, nargs="+", default=[64, 256] if CUDA else [8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048] if CUDA else [32])
    parser.add_argument("--engines", nargs="+", default=["ours", "pipeline", "torch"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument(
        "--one", nargs=4, metavar=("ENGINE", "FOLDER", "REQUESTS", "TOKENS"), help="(internal)"
    )
    options = parser.parse_args()
    use_stand_ins()
    if not CUDA and options.one and options.one[0] == "pipeline":
        import lmdeploy_on_cpu

        lmdeploy_on_cpu.install()
    if options.one:
        engine, folder, *sizes = options.one
        print(json.dumps(measure(engine, Path(folder), *map(int, sizes), options.repeats)))
        return
    print(f"machine: {torch.cuda.get_device_name() if CUDA else 'CPU'}, torch {torch.__version__}\n")
    print("| shape | requests | new tokens | engine | tokens/s | lowest - highest | against the pipeline |")
    print("|---|---:|---:|---|---:|---:|---:|")
    notes, lines = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoint"
        write_checkpoint(folder, SHAPES[options.shape])
        for requests in options.requests:
            for tokens in options.tokens:
                found = {}
                for engine in options.engines:
                    one = ["--one", engine, str(folder), str(requests), str(tokens)]
                    command = [sys.executable, __file__, "--repeats", str(options.repeats), *one]
                    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                    found[engine] = json.loads(done.stdout.splitlines()[-1])
                for engine, f in found.items():
                    rate = f["tokens_per_second"]
                    ratio = rate / found.get("pipeline", f)["tokens_per_second"]
                    lines.append({"engine": engine, "requests": requests, "ratio": ratio} | f)
                    print(
                        f"| {options.shape} | {requests} | {tokens} | {engine} | {rate:.0f} "
                        f"| {f['lowest']:.0f} - {f['highest']:.0f} | {100 * ratio:.0f} % |"
                    )
                notes.append(found.get("ours", {}))
    if options.json:
        write_json(Path(options.json), lines)
    for f in filter(None, notes):
        print(
            f"\nweight update: {f['update_seconds_per_gb']:.3f} s per GB of {f['weights_gb']:.2f} GB; "
            f"sleep: {f['sleep_seconds']:.2f} s, {f['gib_given_back']:.1f} GiB given back"
        )


if __name__ == "__main__":
    run_script(main)
