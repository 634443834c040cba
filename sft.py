"""Stage 1, SFT by random masking.

Every training sequence is laid out once clean, with noised views of its blocks (masking.py). A view
masks each response token with probability t and is weighted by 1/t, so that the loss

    L = - 1/R  sum over views / number of views  sum over masked i  1/t  log p(x_i | view)

(R response tokens in the batch) is an unbiased bound on -log p(response) per token; SDAR (2510.06303)
and BD3-LM (2503.09573, eq. 8). The response's last block is filled up with the end-of-text token and
those are trained too, so that the decoder never meets a block shape that training did not have.

    python sft.py data=data/generated/sft.jsonl                       # one process, a tiny model
    torchrun --nproc_per_node 8 sft.py --config configs/sdar_8b_sft.yaml

Below the loss stands the plumbing that dipo.py shares: the run directory with its checkpoints and
metrics, FSDP2, the optimizer. All randomness is a function of (seed, step, item), never of a
generator's past, so a checkpoint needs no random state beyond the seed, the step and the data cursor.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from tqdm import tqdm

from evaluate import (
    BACKEND,
    EngineName,
    Question,
    answer_questions,
    choose_block_size,
    load_config,
    make_engine,
    read_questions,
    read_rows,
    run_script,
    start_distributed,
    summarize,
    write_json,
    writing,
)
from masking import InputError, Packed, noise, pack, plan_packs, plan_ranks
from model import (
    BlockDiffusion,
    Sampling,
    TensorFiles,
    add_adapters,
    base_parameters,
    checkpoint_layers,
    compile_layers,
    fill,
    find_folder,
    full,
    load,
    load_tokenizer,
    on_meta,
    own_rows,
    save,
    stop_ids,
    tiny,
    whole,
    write_tensors,
)
from rollout import Decoding, Engine, gather

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter, beside its step count


@dataclass
class TrainConfig:
    """Fields that both stages have."""

    model: str = "tiny"  # checkpoint folder or hub id; tiny: a small random one is made in the run
    out: str = "runs/train"  # the run directory
    resume: bool = False  # go on from the newest complete checkpoint in out
    seed: int = 0  # of the data order, noise and rollouts
    block_size: int = 0  # tokens per block; 0: the checkpoint's, or 4
    steps: int = 100  # optimizer steps (SFT) or rollout batches (DiPO)
    lr: float = 1e-5  # peak learning rate
    schedule: Literal["constant", "cosine"] = "constant"  # after the warmup
    warmup_steps: int = 0  # linear warmup
    adam_beta1: float = 0.9  # AdamW
    adam_beta2: float = 0.95  # AdamW
    weight_decay: float = 0.0  # AdamW
    max_grad_norm: float = 1.0  # gradient norm is clipped to this
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; weights stay float32
    token_budget: int = 16384  # packed tokens per forward pass and rank
    reduce_once: bool = True  # sum gradients over ranks once per update; holds them whole till then
    checkpointing: Literal["none", "selective", "full"] = "none"  # activations computed twice, not kept
    compile: bool = False  # torch.compile of every decoder layer
    lora_rank: int = 0  # train adapters of this rank only, for one GPU (peft); 0: all weights
    cpu_offload: bool = False  # weights, gradients and moments wait in the host's memory
    save_every: int = 0  # steps between checkpoints; 0: only the last
    keep_checkpoints: int = 2  # how many stay on disk
    eval_data: str = ""  # question file evaluated during training; empty: none
    eval_every: int = 0  # steps between evaluations; 0: never
    eval_limit: int = 0  # only the first so many questions; 0: all
    eval_max_tokens: int = 64  # new tokens per answer
    eval_threshold: float = 0.9  # of the dynamic, greedy decoding
    prompt: str = "{question}"  # the user's turn; {question} is replaced
    max_batch: int = 256  # answers that the engine generates at once
    engine: EngineName = "auto"  # auto: lmdeploy where it can run, else torch
    cache_gib: float = 0.0  # lmdeploy's key/value cache; 0: 40 % of the free GPU memory
    tensor_parallel: int = 1  # GPUs per engine; only 1 works
    wandb: str = ""  # project to log to as well, if wandb is installed


@dataclass
class SFTConfig(TrainConfig):
    """Fields of sft.py."""

    out: str = "runs/sft"
    data: str = "data/generated/sft.jsonl"  # training file, JSON list or JSON Lines
    batch_size: int = 64  # sequences per optimizer step, over all ranks
    max_tokens: int = 1024  # longest sequence, prompt included
    noise_per: Literal["sequence", "block"] = "sequence"  # what shares a noise level t
    views: int = 1  # noised copies of each block
    complementary: bool = False  # draw views in pairs that mask each other's complement
    t_min: float = 0.02  # noise levels are drawn from [t_min, 1 - t_min]


@dataclass
class Example:
    """A training sequence: whole blocks, of which the first prompt_tokens are the prompt."""

    ids: list[int]
    prompt_tokens: int


def read_examples(path: str, tokenizer, block_size: int, max_tokens: int) -> list[Example]:
    """Encode a training file (formats: data/README.md), each filled up to whole blocks.

    Raises:
        InputError: a row of another format, without a response, or longer than max_tokens.
    """
    examples, stops = [], set(stop_ids(tokenizer))
    for where, row in tqdm(read_rows(path), desc="encode", unit="row"):
        prompt, response = _prompt_and_response(where, row, tokenizer)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = prompt_ids + tokenizer(response, add_special_tokens=False)["input_ids"]
        if ids[-1] not in stops:
            ids.append(tokenizer.eos_token_id)
        ids += [tokenizer.pad_token_id] * (-len(ids) % block_size)
        if len(ids) > max_tokens:
            raise InputError(f"{where}: {len(ids)} tokens, but config key max_tokens is {max_tokens}")
        examples.append(Example(ids, len(prompt_ids)))
    return examples


def _prompt_and_response(where: str, row: dict[str, Any], tokenizer) -> tuple[str, str]:
    match row:
        case {"messages": [*turns, {"role": "assistant", "content": str(response)}]} if turns and all(
            isinstance(t, dict) and isinstance(t.get("content"), str) for t in turns
        ):
            try:
                prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            except Exception as error:  # whatever the template's language raises
                raise InputError(f"{where}: the chat template refuses `messages`") from error
        case {"prompt": str(prompt), "response": str(response)}:
            pass
        case _:
            raise InputError(
                f"{where}: expected `messages` that end with the assistant's, or `prompt` and `response`"
            )
    if not prompt or not response.strip():
        raise InputError(f"{where}: an empty {'response' if prompt else 'prompt'}")
    return prompt, response


def data_order(size: int, seed: int, start: int) -> Iterator[int]:
    """Endless indices below `size`, shuffled anew every epoch, from the start-th on."""
    epoch, offset = divmod(start, size)
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(size)
        yield from order[offset:].tolist()
        epoch, offset = epoch + 1, 0


def sft_loss(logprobs: torch.Tensor, packed: Packed, response_tokens: int) -> torch.Tensor:
    """Weighted cross-entropy of one row, divided by the response tokens of the whole batch."""
    return -(packed.weights * logprobs).sum() / response_tokens


def sft_step(run: Run, config: SFTConfig, batch: list[Example], numbers: list[int]) -> dict:
    """One optimizer step on the global batch; every rank is given all of it and takes its share.

    Args:
        numbers: running number of each example, which with the seed decides its noise.
    """
    noised = []
    for number, example in zip(numbers, batch, strict=True):
        rng = np.random.default_rng([config.seed, 1, number])
        how = (config.noise_per, config.views, config.complementary, config.t_min)
        noised.append(noise(example.ids, example.prompt_tokens, run.block_size, rng, *how))
    response_tokens = sum(len(e.ids) - e.prompt_tokens for e in batch)
    plan = plan_ranks([len(s) for s in noised], config.token_budget, run.world)[run.rank]
    packs = pack(noised, run.block_size, run.mask_id, config.token_budget, plan)
    loss = entropy = 0.0
    rows = sum(len(p.rows) for p in packs)
    for packed in micro_batches(run, packs):
        packed = packed.to(run.device)
        scores = run.model.score(packed, Sampling())
        part = sft_loss(scores.logprobs, packed, response_tokens)
        (part * run.world).backward()  # FSDP2 averages over ranks, the loss is a sum over them
        loss += part.item()
        entropy += scores.entropy.sum().item()
    grad_norm = run.optimizer_step()
    loss, entropy, rows = run.sum_over_ranks(loss, entropy, rows)
    tokens = run.sum_over_ranks(sum(len(p) for p in packs))[0]
    return {
        "loss": loss,
        "entropy": entropy / max(rows, 1),
        "grad_norm": grad_norm,
        "train_tokens": int(tokens),
    }


def micro_batches(run: Run, packs: Sequence) -> Iterator:
    """The packs of one optimizer step, one after the other, for a forward and a backward pass each.

    FSDP2 would sum gradients over the ranks after every backward pass; here only after the last one.
    Till then every rank holds the whole gradient, 4 bytes per parameter; with reduce_once=false it
    holds a shard, and every pass sums. Weights are gathered for every pass either way: keeping them
    whole between passes (set_reshard_after_backward) would undo the sharding.
    """
    for number, packed in enumerate(packs):
        if isinstance(run.model, FSDPModule):
            last = number == len(packs) - 1
            run.model.set_is_last_backward(last)
            run.model.set_requires_gradient_sync(last or not run.config.reduce_once)
        yield packed


def deal(run: Run, records: list, sizes: list[int], token_budget: int) -> tuple[list, list[list[int]]]:
    """Deal the sequences of all ranks out evenly (`plan_ranks`); call on every rank.

    Args:
        records: what this rank has of each of its sequences, anything that can be pickled. It travels
            as a whole, so what belongs to a sequence stays with it.
        sizes: tokens of each in a packed row.

    Returns:
        The records that are this rank's now, and its rows as indices into them.

    Nearly every record changes its rank. A rollout is 26 bytes per token: 512 of 4,096 tokens on every
    rank are 53 MB to send and to receive and 0.4 s of pickling, once per batch of rollouts.
    """
    if run.world == 1:
        return records, plan_packs(sizes, token_budget)
    everyone = gather(sizes)
    home = [(rank, i) for rank, sizes in enumerate(everyone) for i in range(len(sizes))]
    plan = plan_ranks([size for sizes in everyone for size in sizes], token_budget, run.world)
    mine: dict[tuple[int, int], object] = {}
    for source in range(run.world):
        parcels = None
        if source == run.rank:
            wanted = [[home[i] for row in rows for i in row if home[i][0] == source] for rows in plan]
            parcels = [{place: records[place[1]] for place in places} for places in wanted]
        received: list[dict] = [{}]
        dist.scatter_object_list(received, parcels, src=source)
        mine |= received[0]
    index = {place: i for i, place in enumerate(mine)}
    return list(mine.values()), [[index[home[i]] for i in row] for row in plan[run.rank]]


class Run:
    """One training run: process group, model, optimizer, run directory. Both stages use it.

    The directory holds config.yaml, metrics.jsonl, rollouts.jsonl (DiPO), checkpoints/step-N (each a
    Hugging Face folder with the optimizer state beside it) and `latest`, a link to the newest.
    """

    def __init__(self, config: TrainConfig):
        check_config(config)
        self.config, self.out = config, Path(config.out)
        self.rank, self.world, self.device = start_distributed()
        self.step = self.cursor = 0
        checkpoint = self._open_directory()
        self.initial = self._initial_model()
        self.base = checkpoint or self.initial  # where the weights come from
        self.tokenizer = load_tokenizer(str(self.base))
        self.mask_id = self.tokenizer.mask_token_id
        start = self.initial if config.lora_rank else self.base  # adapters have a file of their own
        self.model = load_for_training(str(start), self.world, self.device, config)
        self.block_size = choose_block_size(config.block_size, self.model.config)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
            fused=self.device.type == "cuda" or None,
        )
        if checkpoint:
            self._restore(checkpoint)
        self.model.train()
        self.wandb = self._start_wandb()

    def _open_directory(self) -> Path | None:
        """Prepare the run directory; the newest complete checkpoint if there is one to resume."""
        done = sorted((self.out / "checkpoints").glob("step-*"))
        if not self.config.resume and (done or (self.out / "metrics.jsonl").exists()):
            raise InputError(f"{self.out} already holds a run: give resume=true or another out")
        checkpoint = done[-1] if done else None
        sizes = {}
        if checkpoint:
            state = read_state(checkpoint)
            self.step, self.cursor, sizes = state["step"], state["cursor"], state["log_bytes"]
        self.barrier()
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            with writing(self.out / "config.yaml"):
                OmegaConf.save(OmegaConf.structured(self.config), self.out / "config.yaml")
            for log in ("metrics.jsonl", "rollouts.jsonl"):  # what was logged after it is redone
                if (self.out / log).exists():
                    os.truncate(self.out / log, sizes.get(log, 0))
            for leftover in (self.out / "checkpoints").glob(".part-*"):
                shutil.rmtree(leftover)
            if checkpoint:
                self._link_latest(checkpoint)
                self._drop_old_checkpoints()  # a kill may have come between the newest and this
        self.barrier()
        return checkpoint

    def _initial_model(self) -> Path:
        if self.config.model != "tiny":
            return find_folder(self.config.model)
        folder = self.out / "tiny"
        if self.rank == 0 and not folder.exists():
            part = self.out / ".part-tiny"
            tiny(part, seed=self.config.seed, block_size=self.config.block_size or 4).rename(folder)
        self.barrier()
        return folder

    def _start_wandb(self):
        if not self.config.wandb or self.rank:
            return None
        try:
            import wandb
        except ImportError as error:
            raise InputError("config key wandb: the package is missing, pip install wandb") from error
        settings = dataclasses.asdict(self.config)
        return wandb.init(project=self.config.wandb, dir=self.out, config=settings)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def sum_over_ranks(self, *values: float) -> list[float]:
        """Each value summed over the ranks."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max_over_ranks(self, value: float) -> float:
        """The largest of the ranks' values."""
        return self._reduce([value], dist.ReduceOp.MAX)[0]

    def _reduce(self, values: Iterable[float], op) -> list[float]:
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(list(values), dtype=torch.double, device=self.device)
        dist.all_reduce(tensor, op)
        return tensor.tolist()

    def lr_now(self, update: int, total: int) -> float:
        """Learning rate of the update-th of `total` optimizer updates."""
        c = self.config
        scale = min(1.0, (update + 1) / c.warmup_steps) if c.warmup_steps else 1.0
        if c.schedule == "cosine":
            progress = max(0, update - c.warmup_steps) / max(1, total - c.warmup_steps)
            scale *= (1 + math.cos(math.pi * progress)) / 2
        return c.lr * scale

    def optimizer_step(self, update: int = 0, updates: int = 1) -> float:
        """Clip, step, clear gradients; `update` of `updates` in this step. The norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        lr = self.lr_now(self.step * updates + update, self.config.steps * updates)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return full(norm).item()

    def make_engine(self) -> Engine:
        """The rollout engine, with the weights that the run starts from."""
        log = self.out / f"engine-rank{self.rank}.log"
        return make_engine(str(self.base), self.tokenizer, self.block_size, self.config, log)

    def log(self, **metrics: float) -> None:
        """Append one line to metrics.jsonl."""
        if self.rank:
            return
        log = self.out / "metrics.jsonl"
        with writing(log), open(log, "a") as file:
            file.write(json.dumps({"step": self.step, **metrics}) + "\n")
        if self.wandb:
            self.wandb.log(metrics, step=self.step)

    def due(self, every: int) -> bool:
        """Whether something done every so many steps is due after this step."""
        return bool(every) and (self.step % every == 0 or self.step == self.config.steps)

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole tensor) one by one, gathered from the shards; call on every rank."""
        for name, parameter in base_parameters(self.model):
            yield name, whole(self.model, name, parameter)

    def save(self) -> None:
        """Write checkpoints/step-N; it appears under that name only when it is complete.

        Every rank writes some of the weights' files and its own shard of the optimizer state. (With
        several machines, `out` has to be on a disk that all of them see.)
        """
        folder = self.out / "checkpoints" / f"step-{self.step:06d}"
        if folder.exists() or self.step == 0:
            return
        part = folder.with_name(f".part-{folder.name}")
        part.mkdir(parents=True, exist_ok=True)
        save(self.model, part, self.initial, self.rank, self.world)
        self._save_moments(part)
        self.barrier()
        if self.rank == 0:
            log_bytes = {f.name: f.stat().st_size for f in self.out.glob("*.jsonl")}
            counters = {"step": self.step, "cursor": self.cursor, "seed": self.config.seed}
            write_json(part / "state.json", counters | {"log_bytes": log_bytes})
            for file in part.glob("*.json"):
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            part.rename(folder)
            self._link_latest(folder)
            self._drop_old_checkpoints()
        self.barrier()

    def _drop_old_checkpoints(self) -> None:
        for old in sorted((self.out / "checkpoints").glob("step-*"))[: -self.config.keep_checkpoints]:
            shutil.rmtree(old.rename(old.with_name(f".part-{old.name}")))

    def _save_moments(self, folder: Path) -> None:
        """This rank's rows of AdamW's state.

        Plain safetensors: torch.distributed.checkpoint pickles its index, and its writer for safetensors
        (2.13) builds every file in memory first.
        """
        name = f"optimizer-{self.rank + 1:05d}-of-{self.world:05d}.safetensors"
        tensors, first_rows = {}, {}
        for parameter_name, parameter in self._trained():
            state = self.optimizer.state[parameter]
            for key in MOMENTS:
                rows, first_rows[f"{parameter_name}.{key}"] = own_rows(state[key])
                tensors[f"{parameter_name}.{key}"] = rows.cpu().contiguous()
            tensors["step"] = state["step"].cpu().view(1)  # the same for all
        name = name if self.world > 1 else "optimizer.safetensors"
        write_tensors(folder / name, tensors, "first_rows", json.dumps(first_rows))
        if self.config.lora_rank:
            adapters = {n: p.detach().cpu() for n, p in self._trained()}
            write_tensors(folder / "adapters.safetensors", adapters, "format", "pt")

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)

    def _restore(self, checkpoint: Path) -> None:
        """Load the optimizer state of a checkpoint, whatever number of ranks wrote it."""
        moments = TensorFiles(checkpoint, "optimizer")
        if self.config.lora_rank:
            adapters = TensorFiles(checkpoint, "adapters")
            for name, parameter in self._trained():
                parameter.data.copy_(adapters.rows(name, 0, len(parameter)))
        for name, parameter in self._trained():
            state = {key: torch.zeros_like(parameter) for key in MOMENTS}
            for key, tensor in state.items():
                rows, first = own_rows(tensor)
                if len(rows):
                    rows.copy_(moments.rows(f"{name}.{key}", first, first + len(rows)))
            home = parameter.device if self.optimizer.defaults["fused"] else "cpu"
            step = moments.rows("step", 0, 1)[0].to(home, copy=True)
            self.optimizer.state[parameter] = state | {"step": step}

    def _link_latest(self, checkpoint: Path) -> None:
        link = self.out / ".part-latest"
        link.unlink(missing_ok=True)
        link.symlink_to(checkpoint.relative_to(self.out))
        link.replace(self.out / "latest")


def check_config(config: TrainConfig) -> None:
    """Refuse values that make no sense, before anything is started."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if isinstance(value, int | float) and not isinstance(value, bool) and not value >= 0:
            raise InputError(f"config key {f.name}: {value}, expected 0 or more")
    positive = ["steps", "lr", "max_grad_norm", "token_budget", "keep_checkpoints", "max_batch"]
    positive += [n for n in ("batch_size", "views", "max_tokens") if hasattr(config, n)]
    for name in positive:
        if getattr(config, name) <= 0:
            raise InputError(f"config key {name}: expected more than 0")
    for name in ("adam_beta1", "adam_beta2"):
        if getattr(config, name) >= 1:
            raise InputError(f"config key {name}: {getattr(config, name)}, expected less than 1")
    if isinstance(config, SFTConfig):
        if config.complementary and config.views % 2:
            raise InputError(f"config key views: {config.views}, expected an even number of them")
        if not 0 < config.t_min < 0.5:
            raise InputError(f"config key t_min: {config.t_min}, expected between 0 and 0.5")
    if config.lora_rank and config.cpu_offload:
        raise InputError("config key cpu_offload: with lora_rank nothing is sharded, so nothing waits")
    if config.eval_every and not config.eval_data:
        raise InputError("config key eval_data: expected a question file, since eval_every is set")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        return {name: state[name] for name in ("step", "cursor", "log_bytes")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{checkpoint}/state.json: cannot resume from it ({error})") from error


def load_for_training(name: str, world: int, device: torch.device, config: TrainConfig) -> BlockDiffusion:
    """A checkpoint's model in float32, sharded over the ranks; several never hold a full copy each.

    With LoRA the frozen weights are in config.dtype, and nothing is sharded.
    """
    if config.lora_rank:
        if world > 1:
            raise InputError("config key lora_rank: LoRA is for one process; several shard the whole model")
        model = load(name, getattr(torch, config.dtype), device)
        add_adapters(model, config.lora_rank, config.seed)
        _prepare_layers(model, config)
        return model
    home = "cpu" if config.cpu_offload else device  # FSDP2 brings what is needed to the device
    model = load(name, torch.float32, home) if world == 1 else on_meta(name)
    _prepare_layers(model, config)
    shard(model, world, config.dtype, config.cpu_offload)
    if world > 1:
        fill(model, name, device, home)
    return model


def _prepare_layers(model: BlockDiffusion, config: TrainConfig) -> None:
    checkpoint_layers(model, config.checkpointing)
    if config.compile:
        compile_layers(model)


def shard(model: BlockDiffusion, world: int, dtype: str, cpu_offload: bool = False) -> None:
    """FSDP2: every decoder layer is one unit, the rest another; weights and moments in float32."""
    if world == 1 and dtype == "float32" and not cpu_offload:
        return
    cuda = torch.cuda.is_available()
    if not dist.is_initialized():  # one process: FSDP2 still does the mixed precision
        dist.init_process_group(BACKEND if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    policy = {
        "mp_policy": MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=cuda) if cpu_offload else OffloadPolicy(),
    }
    for layer in model.model.layers:
        fully_shard(layer, **policy)
    fully_shard(model, **policy)
    register_fsdp_forward_method(model, "score")


class Evaluator:
    """Evaluation during training: dynamic, greedy, on the first questions of a file."""

    def __init__(self, run: Run):
        self.run, self.config = run, run.config
        self.questions: list[Question] = read_questions(run.config.eval_data)
        self.questions = self.questions[: run.config.eval_limit or len(self.questions)]

    def __call__(self, engine: Engine) -> dict[str, float]:
        """Accuracy, TPF and the rest of `summarize`, under names that start with eval/."""
        c = self.config
        how = Decoding(top_k=1, threshold=c.eval_threshold, max_tokens=c.eval_max_tokens)
        start = time.perf_counter()
        answers = answer_questions(
            engine, self.run.tokenizer, self.questions, how, self.run.block_size,
            prompt=c.prompt, title="evaluate", weights=self.run.named_weights,
        )  # fmt: skip
        figures = summarize(answers) | {"seconds": time.perf_counter() - start}
        return {f"eval/{name}": value for name, value in figures.items()}


@dataclass
class Stopwatch:
    """Seconds per named phase of a step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        yield
        self.seconds[f"seconds/{phase}"] = time.perf_counter() - start


def main(argv: list[str]) -> None:
    """Train."""
    config = load_config(SFTConfig, argv)
    run = Run(config)
    examples = read_examples(config.data, run.tokenizer, run.block_size, config.max_tokens)
    evaluator = Evaluator(run) if config.eval_every else None
    if evaluator:
        engine = run.make_engine()
        engine.sleep()
    order = data_order(len(examples), config.seed, run.cursor)
    bar = tqdm(total=config.steps, initial=run.step, desc="sft", unit="step", disable=run.rank > 0)
    while run.step < config.steps:
        watch = Stopwatch()
        with watch("train"):
            numbers = list(range(run.cursor, run.cursor + config.batch_size))
            batch = [examples[next(order)] for _ in numbers]
            metrics = sft_step(run, config, batch, numbers)
        lr = run.optimizer.param_groups[0]["lr"]
        run.step, run.cursor = run.step + 1, run.cursor + config.batch_size
        if run.due(config.eval_every):
            with watch("evaluate"):
                engine.update_weights(run.named_weights())
                engine.wake()
                metrics |= evaluator(engine)
                engine.sleep()
        run.log(**metrics, lr=lr, **watch.seconds)
        bar.set_postfix(loss=f"{metrics['loss']:.3f}")
        bar.update()
        if run.due(config.save_every) or run.step == config.steps:
            run.save()
    bar.close()
    if evaluator:
        engine.close()


if __name__ == "__main__":
    run_script(main)
