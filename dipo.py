"""Stage 2, DiPO: online, step-level GRPO for block diffusion.

A step of the loop, and the function that does it:

 1. G rollouts for each of some questions, with their step maps                     rollout.py
 2. reward r_i of each = weighted sum of named rewards                              reward.py
 3. groups without reward spread are dropped, and sampling goes on (DAPO)           collect_groups
 4. advantage A_i = (r_i - mean) / std over the group                               advantages
 5. every decision is replayed as the decoder saw it, in one packed pass            masking.replay
 6. per action k with log-probability l_k: ratio rho_k = exp(l_k - l_old_k), loss
    - sum_k w_k min(rho_k A, clip(rho_k, 1 - eps_low, 1 + eps_high) A) + beta KL    dipo_loss
 7. the new weights go to the engine, in place                                      update_weights

An action is what a masked position did at a step. `likelihood=tokens` (as published) scores reveals
only. `likelihood=exact` scores holds too, so that the sum of the l_k of a trajectory is its exact
log-probability: with confidence-based unmasking, which positions are revealed is itself random.

    torchrun --nproc_per_node 8 dipo.py --config configs/sdar_8b_dipo.yaml
    python dipo.py model=runs/sft/latest data=data/generated/rl.jsonl       # one process, CPU

Sources: DiRL (arXiv 2512.22234, eqs. 6 and 7), GRPO (2402.03300), DAPO (2503.14476), LightningRL for
normalising several rewards each for itself. Left out on purpose: a value network, a replay buffer,
asynchronous rollouts; this is the synchronous loop that one can read.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from tqdm import tqdm

import reward
from evaluate import (
    Answer,
    Question,
    Rule,
    answer_record,
    encode_prompt,
    grade_rollouts,
    load_config,
    read_questions,
    run_script,
    writing,
)
from masking import HOLD, InputError, Packed, pack, replay
from model import BlockDiffusion
from rollout import Decoding, Engine, generate_all
from sft import Evaluator, Run, Stopwatch, TrainConfig, data_order, deal, load_for_training, micro_batches


@dataclass
class DiPOConfig(TrainConfig):
    """Fields of dipo.py."""

    out: str = "runs/dipo"
    data: str = "data/generated/rl.jsonl"  # question file, JSON list or JSON Lines
    groups: int = 32  # useful groups per step, over all ranks (at least; surplus is kept)
    group_size: int = 16  # rollouts per question (G)
    max_rounds: int = 3  # rounds of sampling per step to find them: the bound on the extra work
    rewards: dict[str, float] = field(  # name: weight; merged with the default
        default_factory=lambda: {"accuracy": 1.0}
    )
    advantage_std: bool = True  # divide the advantage by the group's standard deviation
    normalize_each: bool = False  # normalise every reward for itself before they are added
    likelihood: Literal["tokens", "exact"] = "tokens"  # score reveals, or reveals and holds
    normalizer: Literal["group", "batch", "sequence"] = "group"  # eq. 7, DAPO, eq. 6
    clip_low: float = 0.2  # ratios below 1 - clip_low give no gradient
    clip_high: float = 0.28  # ratios above 1 + clip_high give no gradient
    kl_beta: float = 0.0  # weight of the KL to the initial model (k3); 0: none is loaded
    updates: int = 1  # optimizer updates per rollout batch
    rule: Rule = "dynamic"  # decoding rule of the rollouts
    threshold: float = 0.9  # dynamic: confidence that is enough to reveal
    denoising_steps: int = 4  # static, sequential: steps per block
    temperature: float = 1.0  # of rollouts, and of the policy that is trained
    top_k: int = 0  # likewise; 0: off
    top_p: float = 1.0  # likewise; 1: off
    max_tokens: int = 64  # new tokens per rollout
    log_rollouts: int = 2  # rollouts per step and rank that go into rollouts.jsonl


@dataclass
class Group:
    """The rollouts of one question, with what became of them."""

    number: int  # running number of the question; with the seed it decides the rollouts' seeds
    question: Question
    answers: list[Answer]
    rewards: list[dict[str, float]]  # per rollout and reward name, unweighted
    totals: list[float]  # weighted sums

    @property
    def num_tokens(self) -> int:
        """Tokens of all trajectories."""
        return sum(len(a.rollout.response_ids) for a in self.answers)


def advantages(group: Group, config: DiPOConfig) -> list[float]:
    """A_i of each rollout: reward minus the group's mean, over its standard deviation.

    With `normalize_each` every reward is treated so for itself, then weighted and added; a reward
    without spread in the group adds nothing.
    """

    def centred(values: list[float], divide: bool) -> list[float]:
        mean = sum(values) / len(values)
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
        if std < 1e-6:
            return [0.0] * len(values)
        return [(v - mean) / (std if divide else 1.0) for v in values]

    if not config.normalize_each:
        return centred(group.totals, config.advantage_std)
    columns = [
        [weight * v for v in centred([r[name] for r in group.rewards], True)]
        for name, weight in config.rewards.items()
    ]
    return [sum(row) for row in zip(*columns, strict=True)]


def is_useful(group: Group, config: DiPOConfig) -> bool:
    """Whether the rewards differ, so that there is an advantage to learn from."""
    return any(advantages(group, config))


def collect_groups(
    run: Run,
    engine: Engine,
    questions: list[Question],
    order: Iterator[int],
    config: DiPOConfig,
    how: Decoding,
) -> tuple[list[Group], dict[str, float]]:
    """This rank's useful groups, until all ranks together have `config.groups` (DAPO).

    Every round asks for as many further questions as are missing at the rate of useful ones so far.

    Returns:
        The useful groups, and figures over *all* rollouts, useful or not.

    Raises:
        InputError: no useful group within config.max_rounds rounds.
    """
    kept: list[Group] = []
    total: Counter[str] = Counter()  # over all ranks and rounds
    for _ in range(config.max_rounds):
        missing = config.groups - total["useful"]
        useful_rate = max(total["useful"], 1) / total["groups"] if total["groups"] else 1.0
        count = math.ceil(missing / max(useful_rate, 0.25))
        numbers = [(run.cursor + i, next(order)) for i in range(count)]
        run.cursor += count
        groups = sample_groups(run, engine, questions, numbers[run.rank :: run.world], config, how)
        useful = [g for g in groups if is_useful(g, config)]
        kept += useful
        counts = count_rollouts(groups, useful)
        total.update(dict(zip(counts, run.sum_over_ranks(*counts.values()), strict=True)))
        if total["useful"] >= config.groups:
            break
    if not total["useful"]:
        raise InputError(
            f"{config.data}: no useful group among {total['groups']:.0f} questions in {config.max_rounds} "
            "rounds: all answers to a question had the same reward (too easy, too hard, or max_tokens "
            "too small)"
        )
    return kept, {
        "reward": total["reward"] / total["rollouts"],
        "reward_kept": total["useful_reward"] / (total["useful"] * config.group_size),
        "accuracy": total["correct"] / total["rollouts"],
        "tpf": total["tokens"] / total["steps"],
        "response_tokens": total["shown"] / total["rollouts"],
        "truncation_rate": total["truncated"] / total["rollouts"],
        "groups_kept": int(total["useful"]),
        "groups_asked": int(total["groups"]),
        "kept_rate": total["useful"] / total["groups"],
        "rollout_tokens": int(total["tokens"]),
    }


def count_rollouts(groups: list[Group], useful: list[Group]) -> dict[str, float]:
    """This rank's sums over the rollouts of a round, `useful` being some of its groups."""
    answers = [a for g in groups for a in g.answers]
    return {
        "groups": len(groups),
        "useful": len(useful),
        "rollouts": len(answers),
        "reward": sum(sum(g.totals) for g in groups),
        "useful_reward": sum(sum(g.totals) for g in useful),
        "correct": sum(a.graded.correct for a in answers),
        "truncated": sum(a.graded.truncated for a in answers),
        "tokens": sum(len(a.rollout.response_ids) for a in answers),
        "shown": sum(a.rollout.num_tokens for a in answers),
        "steps": sum(a.rollout.num_steps for a in answers),
    }


def sample_groups(
    run: Run,
    engine: Engine,
    questions: list[Question],
    numbers: list[tuple[int, int]],
    config: DiPOConfig,
    how: Decoding,
) -> list[Group]:
    """Roll out and grade G answers to each question, given as (running number, index)."""
    prompts, seeds = [], []
    for number, index in numbers:
        ids = encode_prompt(run.tokenizer, config.prompt.replace("{question}", questions[index].text))
        prompts += [ids] * config.group_size
        first = (config.seed % 2**23 << 40) + number * config.group_size
        seeds += range(first, first + config.group_size)
    hidden = run.rank > 0
    with tqdm(total=len(prompts), desc="rollouts", unit="rollout", leave=False, disable=hidden) as bar:
        rollouts = generate_all(engine, prompts, seeds, how, lambda rollout: bar.update(), run.named_weights)
    asked = [questions[index] for _, index in numbers for _ in range(config.group_size)]
    answers = grade_rollouts(run.tokenizer, rollouts, asked, run.block_size, how.max_tokens)
    groups = []
    for i, (number, index) in enumerate(numbers):
        chosen = answers[i * config.group_size : (i + 1) * config.group_size]
        rewards = [reward.score(a.graded, config.rewards) for a in chosen]
        totals = [reward.total(r, config.rewards) for r in rewards]
        groups.append(Group(number, questions[index], chosen, rewards, totals))
    return groups


def dipo_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantage: torch.Tensor,
    weights: torch.Tensor,
    config: DiPOConfig,
    reference_logprobs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped surrogate of the actions of one row, to be added over all rows of the batch.

    Args:
        logprobs, old_logprobs: [M] of each action, under the policy now and when it was sampled.
        advantage: [M] of the action's trajectory.
        weights: [M] the normaliser, see `action_weight`.
        reference_logprobs: [M] under the frozen reference, if config.kl_beta is not 0.

    Returns:
        The loss, and sums over actions of: clipped (clip active), policy_kl (k3, old to new), kl.
    """
    log_ratio = logprobs - old_logprobs  # [M]
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    loss = -(weights * surrogate).sum()
    sums = {
        "clipped": (clipped * advantage < ratio * advantage).sum(),
        "policy_kl": k3(old_logprobs, logprobs.detach()).sum(),
    }
    if reference_logprobs is not None:
        kl = k3(logprobs, reference_logprobs)
        loss = loss + config.kl_beta * (weights * kl).sum()
        sums["kl"] = kl.detach().sum()
    return loss, sums


def k3(logprobs: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 estimator of KL(policy || other) on actions drawn from the policy; never < 0."""
    log_ratio = other - logprobs
    return log_ratio.exp() - log_ratio - 1


def action_weight(
    config: DiPOConfig, group: Group, tokens: int, all_groups: float, all_tokens: float
) -> float:
    """Weight of each action of a trajectory with `tokens` tokens; totals are over all ranks.

    group: sum over the group / its tokens, then mean over groups (DiRL, eq. 7); batch: sum / all
    tokens (DAPO); sequence: mean per response, then mean (eq. 6). Tokens are counted, not actions,
    so that `exact` and `tokens` are on one scale.
    """
    if config.normalizer == "group":
        return 1 / (group.num_tokens * all_groups)
    if config.normalizer == "batch":
        return 1 / all_tokens
    return 1 / (tokens * config.group_size * all_groups)


def pack_groups(run: Run, groups: list[Group], config: DiPOConfig) -> tuple[list[Packed], torch.Tensor]:
    """This rank's even share of all ranks' rollouts as packed rows, and each trajectory's advantage.

    The rows are weighted by the global normaliser; `Packed.trajectory` indexes the advantages.
    """
    tokens = sum(g.num_tokens for g in groups)
    all_groups, all_tokens = run.sum_over_ranks(len(groups), tokens)
    records, sizes = [], []
    for group in groups:
        for answer, advantage in zip(group.answers, advantages(group, config), strict=True):
            r = answer.rollout
            weight = action_weight(config, group, len(r.response_ids), all_groups, all_tokens)
            records.append((r, weight, advantage))
            sizes.append(len(r.prompt_ids) + len(r.response_ids) + run.block_size * r.num_steps)
    records, rows = deal(run, records, sizes, config.token_budget)
    exact = config.likelihood == "exact"
    views = [replay(rollout, run.block_size, weight, exact) for rollout, weight, _ in records]
    packs = pack(views, run.block_size, run.mask_id, config.token_budget, rows)
    return packs, torch.tensor([advantage for _, _, advantage in records], device=run.device)


def update_policy(
    run: Run,
    groups: list[Group],
    config: DiPOConfig,
    how: Decoding,
    reference: BlockDiffusion | None = None,
) -> dict[str, float]:
    """All optimizer updates on one batch of groups."""
    packs, advantage = pack_groups(run, groups, config)
    packs = [p.to(run.device) for p in packs]
    old = references = [None] * len(packs)
    with torch.no_grad():
        if config.updates > 1:  # with one update, the policy that sampled is the policy now
            old = [run.model.score(p, how).logprobs for p in packs]
        if reference is not None:
            references = [reference.score(p, how).logprobs for p in packs]
    sums: dict[str, float] = {}
    gap_max = 0.0
    for update in range(config.updates):
        rows = list(zip(packs, old, references, strict=True))
        bar = tqdm(rows, desc="train", unit="pack", leave=False, disable=run.rank > 0)
        for packed, old_logprobs, reference_logprobs in micro_batches(run, bar):
            scores = run.model.score(packed, how)
            if old_logprobs is None:
                old_logprobs = scores.logprobs.detach()
            loss, row = dipo_loss(
                scores.logprobs,
                old_logprobs,
                advantage[packed.trajectory],
                packed.weights,
                config,
                reference_logprobs,
            )
            (loss * run.world).backward()  # FSDP2 averages over ranks, the loss is a sum over them
            row |= {"loss": loss.detach(), "entropy": scores.entropy.detach().sum()}
            row |= {"actions": len(packed.rows), "holds": (packed.targets == HOLD).sum()}
            if update == 0:
                row |= {"train_tokens": len(packed)}
                gap = engine_gap(scores.logprobs.detach(), packed.engine_logprobs)
                gap_max = max(gap_max, gap.pop("max"))
                row |= gap
            for name, value in row.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        grad_norm = run.optimizer_step(update, config.updates)
    sums = dict(zip(sums, run.sum_over_ranks(*sums.values()), strict=True))
    metrics = {
        "loss": sums["loss"] / config.updates,
        "entropy": sums["entropy"] / sums["actions"],
        "clip_fraction": sums["clipped"] / sums["actions"],
        "policy_kl": sums["policy_kl"] / sums["actions"],
        "hold_fraction": sums["holds"] / sums["actions"],
        "grad_norm": grad_norm,
        "gap_mean": sums["gap"] / sums["reveals"],
        "gap_max": run.max_over_ranks(gap_max),
        "gap_kl": sums["gap_kl"] / sums["reveals"],
        "train_tokens": int(sums["train_tokens"]),
    }
    return metrics | ({"kl": sums["kl"] / sums["actions"]} if "kl" in sums else {})


def engine_gap(logprobs: torch.Tensor, engine_logprobs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums and maximum of |trainer - engine| log-probability over reveals, and its k3-KL.

    Both scored the same tokens in the same states, so in float32 it is rounding (< 1e-4). It grows
    if mask, positions, cache, step map, temperature or a stale weight disagree.
    """
    revealed = engine_logprobs.isfinite()
    ours, theirs = logprobs[revealed], engine_logprobs[revealed]
    gap = (ours - theirs).abs()
    return {
        "gap": gap.sum(),
        "gap_kl": k3(theirs, ours).sum(),
        "reveals": revealed.sum(),
        "max": gap.max().item() if len(gap) else 0.0,
    }


def log_rollouts(run: Run, groups: list[Group], config: DiPOConfig) -> None:
    """Append some rollouts of rank 0's step to rollouts.jsonl."""
    if run.rank:
        return
    log = run.out / "rollouts.jsonl"
    with writing(log), open(log, "a") as file:
        for group in groups[: config.log_rollouts]:
            record = answer_record(group.question, group.answers[0])
            record |= {"step": run.step, "rewards": group.rewards[0]}
            record |= {"advantage": advantages(group, config)[0]}
            file.write(json.dumps(record) + "\n")


def check_dipo_config(config: DiPOConfig) -> None:
    """Refuse what only this stage can get wrong."""
    try:
        reward.check_names(config.rewards)
    except ValueError as error:
        raise InputError(f"config key rewards: {error}") from error
    if config.group_size < 2:
        raise InputError(f"config key group_size: {config.group_size}, expected at least 2")
    for name in ("groups", "max_rounds", "updates", "denoising_steps", "temperature"):
        if getattr(config, name) <= 0:
            raise InputError(f"config key {name}: expected more than 0")


def main(argv: list[str]) -> None:
    """Train."""
    config = load_config(DiPOConfig, argv)
    check_dipo_config(config)
    questions = read_questions(config.data)
    run = Run(config)
    evaluator = Evaluator(run) if config.eval_every else None
    engine = run.make_engine()
    reference = None
    if config.kl_beta:
        reference = load_for_training(str(run.initial), run.world, run.device, config).requires_grad_(False)
    how = Decoding.from_config(config)
    order = data_order(len(questions), config.seed, run.cursor)
    bar = tqdm(total=config.steps, initial=run.step, desc="dipo", unit="step", disable=run.rank > 0)
    while run.step < config.steps:
        watch = Stopwatch()
        with watch("rollout"):
            try:
                groups, metrics = collect_groups(run, engine, questions, order, config, how)
            except InputError:
                run.save()  # what was learned so far is not lost
                raise
        with watch("train"):
            metrics["gib_given_back"] = engine.sleep() / 2**30
            metrics |= update_policy(run, groups, config, how, reference)
        lr = run.optimizer.param_groups[0]["lr"]
        run.step += 1
        with watch("update_weights"):
            engine.update_weights(run.named_weights())
            engine.wake()
        if run.due(config.eval_every):
            with watch("evaluate"):
                metrics |= evaluator(engine)
        run.log(**metrics, lr=lr, **watch.seconds)
        log_rollouts(run, groups, config)
        bar.set_postfix(accuracy=f"{metrics['accuracy']:.3f}", tpf=f"{metrics['tpf']:.2f}")
        bar.update()
        if run.due(config.save_every) or run.step == config.steps:
            run.save()
    bar.close()
    engine.close()


if __name__ == "__main__":
    run_script(main)
