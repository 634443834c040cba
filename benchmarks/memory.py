"""Will it fit, and how long will a step take? Predicted before any GPU is rented.

What is planned is a command of sft.py or dipo.py, with the same fields: memory of one GPU, phase by phase
(plumbing/gpu.py, which also refuses at the start of a run what cannot fit), and the time of the training
part of a step. That is the model FLOPs of the packed rows (`forward_backward_flops`) over what the GPUs are
assumed to reach; rollouts, and the transfer of weights, are not in it.

    python benchmarks/memory.py dipo --config configs/sdar_8b_dipo.yaml model=8B ranks=8
    python benchmarks/memory.py sft --config my.yaml model=path/to/checkpoint ranks=1 gpu_gib=79.1
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, Qwen3MoeConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import model as sdar
from dipo import DiPOConfig
from plumbing.common import InputError, run_script
from plumbing.config import load_config, setting
from plumbing.gpu import GIB, Job, cache_bytes_per_token, parameters, plan, problem
from sft import SFTConfig


def qwen3(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int = 8, **more
) -> dict[str, Any]:
    """Fields of a config.json of Qwen3, which SDAR was trained from."""
    fields = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    fields |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 128}
    return fields | {"vocab_size": 151936, "tie_word_embeddings": False} | more


SHAPES = {
    "1.7B": qwen3(2048, 6144, 28, 16, tie_word_embeddings=True),
    "4B": qwen3(2560, 9728, 36, 32, tie_word_embeddings=True),
    "8B": qwen3(4096, 12288, 36, 32),
    "30B-A3B": qwen3(
        2048, 6144, 48, 32, 4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768
    ),
    # for the CPU; wider weights, since flat distributions would hide an error
    "small": qwen3(256, 768, 4, 4, 2, head_dim=64, vocab_size=4096, initializer_range=0.1),
}


@dataclass
class Machine:
    """Fields of benchmarks/memory.py beside those of the script."""

    model: str = setting("8B", f"{', '.join(SHAPES)}, a config.json or a checkpoint folder", heading="Plan")
    ranks: int = setting(8, "GPUs", above=0)
    gpu_gib: float = setting(139.8, "memory of each; H200: 139.8, H100: 79.1", above=0, below=math.inf)
    prompt_tokens: int = setting(1024, "of a question", above=0)
    response_tokens: int = setting(0, "of a usual response, for the time; 0: the longest")
    tpf: float = setting(2.0, "tokens per forward of the rollouts", at_least=1)
    tflops: float = setting(
        989.0, "dense peak in `dtype`; H100 and H200 in bfloat16: 989", above=0, below=math.inf
    )
    utilisation: float = setting(0.4, "model FLOPs over that peak, without recomputation", above=0, at_most=1)

    def check(self) -> None:
        """Refuse what the bounds of single fields do not say; data and checkpoints need not be there yet.

        Raises:
            InputError: naming the field.
        """
        if self.tpf > (self.block_size or 4):
            raise InputError(f"config key tpf: {self.tpf}, expected at most block_size")


@dataclass
class SFTPlan(Machine, SFTConfig):
    """A command of sft.py on some machine."""


@dataclass
class DiPOPlan(Machine, DiPOConfig):
    """A command of dipo.py on some machine."""


STAGES = {"sft": SFTPlan, "dipo": DiPOPlan}


def model_config(name: str) -> PreTrainedConfig:
    """The shape of a model by name, or from a config.json or the folder that holds one.

    Raises:
        InputError: no such name or file, not JSON, a field that is missing or no positive integer.
    """
    fields = SHAPES.get(name)
    if fields is None:
        path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"config key model: {name}, expected {', '.join(SHAPES)} or a file") from error
        except ValueError as error:
            raise InputError(f"{path}: not JSON ({error})") from error
        needed = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
        for field in needed + ["intermediate_size", "num_key_value_heads", "head_dim"]:
            value = fields.get(field) if isinstance(fields, dict) else None
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{path}: field {field} is {value!r}, expected a positive integer")
    fields = {k: v for k, v in fields.items() if k not in ("model_type", "architectures", "auto_map")}
    # transformers chooses the experts' kernel by looking at the file that a class is from: its own
    return (Qwen3MoeConfig if "num_experts" in fields else sdar.SDARConfig)(**fields)


def forward_backward_flops(config: PreTrainedConfig, tokens: int, pairs: int, scored: int) -> int:
    """FLOPs that a training pass cannot do without: no recomputation, no invisible pairs.

    A matrix of P parameters costs a token 2 P forward and 4 P backward; a pair of tokens that see each
    other 4 D per head and layer (scores, then the weighted sum) forward and twice that backward.

    Args:
        pairs: (query, key) pairs that are visible, see `visible_pairs`.
        scored: positions that the LM head projects.
    """
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
    matrices = parameters(config)["used"] * tokens + config.hidden_size * config.vocab_size * scored
    return 6 * matrices + attention


def visible_pairs(block: torch.Tensor, block_size: int) -> int:
    """Pairs of a packed row, from the block of every token: clean tokens and views of block b alike
    see b blocks before theirs, and their own."""
    return int(((block + 1) * block_size).sum())


def packed_sequence(prompt: int, response: int, views: float, block_size: int) -> tuple[int, int]:
    """(tokens, visible pairs) of one sequence in the packed layout; `views` of each block of the response."""
    blocks = torch.arange(-(-(prompt + response) // block_size))
    generated = blocks[prompt // block_size :]
    pairs = block_size * (visible_pairs(blocks, block_size) + views * visible_pairs(generated, block_size))
    return round(block_size * (len(blocks) + views * len(generated))), round(pairs)


def planned_job(config: SFTPlan | DiPOPlan) -> Job:
    """What gpu.plan needs to know; with LMDeploy as the engine, as on a GPU."""
    longest = config.max_tokens
    if isinstance(config, DiPOPlan):
        longest += config.prompt_tokens
    engine = "lmdeploy" if config.engine == "auto" else config.engine
    return Job.of(config, model_config(config.model), config.ranks, longest, engine)


def step_time(config: SFTPlan | DiPOPlan) -> dict[str, float]:
    """Packed tokens, PFLOP and seconds of the training part of a step of usual responses."""
    job, prompt = planned_job(config), config.prompt_tokens
    response = config.response_tokens or job.longest - prompt
    if isinstance(config, DiPOPlan):
        sequences, views = config.groups * config.group_size, job.block_size / config.tpf
    else:
        sequences, views = config.batch_size, config.views
    tokens, pairs = packed_sequence(prompt, response, views, job.block_size)
    flops = sequences * forward_backward_flops(job.shape, tokens, pairs, response)
    return {
        "packed tokens": sequences * tokens,
        "PFLOP": flops / 1e15,
        "seconds": flops / (config.ranks * config.tflops * 1e12 * config.utilisation),
    }


def main(config: SFTPlan | DiPOPlan) -> None:
    """Print the parts, the verdict and the time."""
    # Every part of every phase.
    job, gpu_bytes, note = planned_job(config), config.gpu_gib * GIB, ""
    print("| phase | part, per GPU | GiB |\n|---|---|---:|")
    for phase, parts in plan(job, gpu_bytes).items():
        for name, size in parts.items():
            print(f"| {phase} | {name} | {size / GIB:.2f} |")
        print(f"| **{phase}** | | **{sum(parts.values()) / GIB:.2f}** |")
        if "engine: cache" in parts:
            tokens = parts["engine: cache"] / cache_bytes_per_token(job.shape, 2)
            note = f"\nThe cache holds {tokens:,.0f} tokens, {tokens / job.longest:.0f} full responses."

    # The verdict.
    print(note)
    reason = problem(job, gpu_bytes)
    verdict = f"does not fit: {reason}" if reason else "fits"
    print(f"\n{config.model}, {config.ranks} GPUs of {config.gpu_gib:g} GiB: {verdict}.")
    time = step_time(config)
    print(
        f"Training part of a step: {time['packed tokens']:,} packed tokens, {time['PFLOP']:,.1f} PFLOP, "
        f"{time['seconds']:.1f} s at {100 * config.utilisation:.0f} % of {config.tflops:g} TFLOP/s per GPU."
    )


def parse(argv: list[str]) -> SFTPlan | DiPOPlan:
    """The config of the stage that the first argument names.

    Raises:
        InputError: another name, or a bad field.
    """
    if not argv or argv[0] not in STAGES and argv[0] not in ("-h", "--help"):
        raise InputError(f"{argv[0] if argv else 'no argument'}: expected sft or dipo first, then its fields")
    return load_config(STAGES.get(argv[0], DiPOPlan), argv[1:] if argv[0] in STAGES else argv)


if __name__ == "__main__":
    run_script(lambda argv: main(parse(argv)), sys.argv[1:])
