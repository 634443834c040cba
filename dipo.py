"""Stage 2, DiPO: online, step-level GRPO for block diffusion.

A step of the loop, and the function that does it:

 1. G rollouts for each of some questions, with their step maps                     rollout.py
 2. reward r_i of each = weighted sum of named rewards                              reward.py
 3. groups without reward spread are dropped, and sampling goes on (DAPO)           collect_groups
 4. advantage A_i = (r_i - mean) / std over the group                               group_advantages
 5. every decision is replayed as the decoder saw it, in one packed pass            masking.replay
 6. per action k with log-probability l_k: ratio rho_k = exp(l_k - l_old_k), loss
    sum_k w_k (beta KL_k - min(rho_k A, clip(rho_k, 1 - eps_low, 1 + eps_high) A))  dipo_loss
 7. the new weights go to the engine, in place                                      update_weights

An action is what a masked position did at a step. `likelihood=tokens` (as in DiRL) scores reveals
only. `likelihood=exact` scores holds too, so that the sum of the l_k of a trajectory is its exact
log-probability: with confidence-based unmasking, which positions are revealed is itself random.

What makes decoding faster, all of it off by default, and what each is:

    rewards.speed, ...           policy gradient of the expected reward, as with every reward
    speed_credit                 credit_per=answer: policy gradient of the number of steps of right answers;
                                 block, position: not that, being blind to later steps
    certainty                    an auxiliary loss, SFT on own right answers: pack_certainty
    dither                       no term: it lets the exact likelihood see how close a draw was to a reveal

"Policy gradient" means exactly that with likelihood=exact, before ratios are clipped and advantages are
divided by a standard deviation.

    torchrun --nproc_per_node 8 dipo.py --config configs/sdar_8b_dipo.yaml
    python dipo.py model=runs/sft/latest data=data/generated/rl.jsonl       # one process, CPU

Sources: DiRL (arXiv 2512.22234, eqs. 6 and 7), GRPO (2402.03300), DAPO (2503.14476), LightningRL
(2603.13319) for normalising several rewards separately, Kimi k1.5 (2501.12599) for partial rollouts, which
go on in a later step. Left out on purpose: a value network, a replay buffer, rollouts while the trainer
works; this is the synchronous loop that one can read.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import reward
from plumbing.common import InputError, run_script
from plumbing.config import Rule, TrainConfig, check_sources, read_arguments, setting


@dataclass
class DiPOConfig(TrainConfig):
    """Fields of dipo.py."""

    out: str = setting("runs/dipo", "the run directory, as of sft.py, with rollouts.jsonl", may_change=True)
    data: str = setting("data/generated/rl.jsonl", "question file", heading="Questions and groups")
    groups: int = setting(32, "useful groups wanted per step, over all ranks; surplus is kept", above=0)
    group_size: int = setting(16, "rollouts per question (G)", at_least=2)
    keep_groups: Literal["spread", "correctness"] = setting(
        "spread", "useful groups: those whose rewards differ, or those of right and wrong responses"
    )
    least_tpf_spread: float = setting(
        0.0, "groups without right or without wrong responses: useful if TPF of right ones differs by so much"
    )
    even_ranks: bool = setting(False, "a rank takes the next rollout when it has room", may_change=True)
    max_rounds: int = setting(3, "after so many rounds of sampling fewer useful groups will do", above=0)
    rewards: dict[str, float] = setting({"accuracy": 1.0}, "name: weight; 0: left out", at_least=None)
    reward_seconds: float = setting(30.0, "limit for a call of your own reward", above=0, may_change=True)
    log_rollouts: int = setting(2, "rollouts per step that go into rollouts.jsonl", may_change=True)

    advantage_std: bool = setting(True, "divide by the group's standard deviation", heading="Objective")
    normalize_each: bool = setting(False, "normalise every reward separately before they are added")
    speed_credit: float = setting(0.0, "weight of speed_credits, added to the advantages of right answers")
    credit_per: Literal["answer", "block", "position"] = setting("answer", "whose steps: see speed_credits")
    certainty: float = setting(0.0, "weight of the NLL of right answers, see pack_certainty")
    certainty_on: Literal["right", "fast"] = setting(
        "right", "all right answers, or those with at least the mean TPF of the group's right answers"
    )
    certainty_at: Literal["first", "noise"] = setting(
        "first", "what is masked: whole blocks, or tokens at random as in SFT"
    )
    likelihood: Literal["tokens", "exact"] = setting("tokens", "score reveals, or reveals and holds")
    normalizer: Literal["group", "batch", "sequence"] = setting("group", "see action_weight")
    clip_low: float = setting(0.2, "no gradient from ratios below 1 - clip_low if the advantage is negative")
    clip_high: float = setting(0.28, "no gradient from ratios above 1 + clip_high if it is positive")
    log_ratio_clamp: float = setting(0.0, "log-ratios beyond +- this have no gradient; 0: off")
    train_on: Literal["sampled", "softmax"] = setting(
        "sampled", "the policy: what was sampled from, or the softmax before top_k and top_p"
    )
    kl_beta: float = setting(0.0, "weight of the KL to the reference, the initial model; 0: none is loaded")
    correction: Literal["none", "truncate", "mask"] = setting(
        "none", "for the engine's rounding, by the ratio trainer / engine of each action: correction_weights"
    )
    correction_low: float = setting(0.5, "mask: actions with a smaller ratio have weight 0", at_most=1)
    correction_high: float = setting(
        2.0, "likewise with a larger one; truncate: it counts as this", at_least=1
    )
    updates: int = setting(1, "optimizer updates per batch of rollouts", above=0)
    gap_limit: dict[str, float] = setting(
        {"float32": 0.01, "bfloat16": 0.2},
        "engine and trainer further apart (metric gap_capped): not trained on; 0: off",
        may_change=True,
    )

    rule: Rule = setting("dynamic", "decoding rule", heading="Decoding of the rollouts")
    threshold: float = setting(0.9, "dynamic: confidence that is enough to reveal", at_most=1)
    dither: float = setting(
        0.0, "dynamic: each position and step draws its threshold from [threshold - dither, threshold]"
    )
    denoising_steps: int = setting(4, "static, sequential: steps per block", above=0)
    temperature: float = setting(1.0, "of rollouts, and of the policy that is trained", above=0)
    top_k: int = setting(0, "likewise; 0: off")
    top_p: float = setting(1.0, "likewise; 1: off", above=0, at_most=1)
    max_tokens: int = setting(64, "new tokens per rollout", above=0)
    partial_tokens: int = setting(0, "of these per step; the next step goes on where one stopped; 0: off")
    max_age: int = setting(0, "groups with tokens of more updates ago (long answers) are dropped; 0: none")

    def check(self) -> None:
        """Check the names of the rewards and the data file; see TrainConfig."""
        super().check()
        try:
            reward.check_names(self.rewards)
        except ValueError as error:
            raise InputError(f"config key rewards: {error}") from error
        if unknown := self.gap_limit.keys() - {"float32", "bfloat16"}:
            raise InputError(f"config key gap_limit: {min(unknown)}, expected float32 or bfloat16")
        if (self.likelihood, self.train_on) == ("exact", "softmax"):
            raise InputError("config key train_on: softmax, expected sampled, since likelihood is exact")
        if self.dither and (self.rule, self.likelihood) != ("dynamic", "exact"):
            raise InputError("config key dither: only with rule=dynamic and likelihood=exact")
        if self.dither > self.threshold:
            raise InputError(f"config key dither: {self.dither}, expected at most threshold={self.threshold}")
        check_sources(self)


if __name__ == "__main__":  # a bad argument is answered before the imports below, which take seconds
    CONFIG = read_arguments(DiPOConfig)

import math
import statistics
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import torch

from evaluate import evaluate_now
from masking import HOLD, Packed, all_masked, noise, pack, replay
from model import Sampling, choose_block_size, load_for_training
from plumbing.checkpoint import encode_prompt, gathered, load_tokenizer, named_weights
from plumbing.common import DataOrder, Stopwatch, progress
from plumbing.gpu import check_memory, reshard, to_engine, to_trainer
from plumbing.guard import Guard, noted, together
from plumbing.lengths import fitting_questions
from plumbing.open_groups import OpenGroup, Rounds, grow_older, read_groups
from plumbing.queue import Ahead, Request, SharedQueue
from plumbing.ranks import deal, gather, micro_batches, rank_and_world, start_distributed, sum_over_ranks
from plumbing.run_folder import RunFolder, due, lr_at, make_optimizer, set_lr
from reward import Graded, Question, grade, read_questions
from rollout import Decoding, Engine, Rollout, generate_all, make_engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from model import BlockDiffusion


# ------------------------------------------------------------------- groups and advantages


@dataclass
class Group:
    """The rollouts of one question, graded, with rewards and advantages."""

    number: int  # running number of the question; with the seed it decides the rollouts' seeds
    graded: list[Graded]
    rewards: list[dict[str, float]]  # per rollout and reward name, unweighted
    totals: list[float]  # per rollout, the weighted sum
    advantages: list[float]  # per rollout
    useful: bool = True  # whether there is something to learn from it: config.keep_groups
    credits: list[list[float]] | None = None  # per rollout and token, see speed_credits; None: none

    @property
    def trajectory_tokens(self) -> int:
        """Tokens of all trajectories, shown or not."""
        return sum(len(g.rollout.response_ids) for g in self.graded)


def make_group(number: int, graded: list[Graded], config: DiPOConfig) -> Group:
    """The group of some graded rollouts of one question."""
    rewards = [reward.values(g, config.rewards, config.reward_seconds) for g in graded]
    for of_one in rewards:
        for name, value in of_one.items():
            noted(value, f"reward {name} of a response to {graded[0].question.where}")
    totals = [reward.total(r, config.rewards) for r in rewards]
    advantages = group_advantages(rewards, totals, config)
    credits = speed_credits(graded, config) if config.speed_credit else None
    right = [g for g in graded if g.correct]
    useful = any(advantages) or any(map(any, credits or [])) or bool(config.certainty and right)

    # Dropped by choice: verdicts that are all the same, or these at nearly one speed.
    if len(right) in (0, len(graded)):
        speeds = [g.rollout.tokens_per_forward for g in right] or [0.0]
        useful = useful and max(speeds) - min(speeds) >= config.least_tpf_spread
        useful = useful and config.keep_groups == "spread"
    elif config.keep_groups == "correctness":
        useful = True
    return Group(number, graded, rewards, totals, advantages, useful, credits)


def group_advantages(rewards: list[dict[str, float]], totals: list[float], config: DiPOConfig) -> list[float]:
    """A_i of each rollout of a group: its reward minus the group's mean, over the standard deviation.

    Without `advantage_std` there is no division. With `normalize_each` mean and standard deviation are
    taken of every reward separately, then they are weighted and added. What has no spread adds nothing.
    """

    def normalized(values: list[float], by_std: bool) -> list[float]:
        mean = sum(values) / len(values)
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
        if std < 1e-6:
            return [0.0] * len(values)
        return [(v - mean) / (std if by_std else 1.0) for v in values]

    if not config.normalize_each:
        return normalized(totals, config.advantage_std)
    summed = [0.0] * len(rewards)
    for name, weight in config.rewards.items():
        for i, value in enumerate(normalized([r[name] for r in rewards], by_std=True)):
            summed[i] += weight * value
    return summed


def speed_credits(graded: list[Graded], config: DiPOConfig) -> list[list[float]]:
    """How many steps each token of a right answer saved, against the mean of the group's other right answers.

    The steps that count for a token, by config.credit_per:

        answer     those of its block and of all later ones: what its decision can still influence
        block      those of its block
        position   those of its block until it was revealed

    They are compared with the answers that have such a token, and weighted by config.speed_credit; with
    advantage_std in units of the standard deviation of the whole answers' steps. Zero for wrong answers, and
    where nothing can be compared.

    Let C_t be the steps that count for token t, q_t the probability that an answer is right and has a token
    t, and d_t the gradient through the actions at token t. Without division and with likelihood=exact, the
    credits of a group of G times the gradients of the actions' log-probabilities have the expected sum

        - G sum_t q_t w_t d_t E[C_t | right, has t]        w_t = 1 - (1 - q_t)^(G - 1)

    (enumerated in tests/test_likelihood.py), where w_t is the chance that there is an answer to compare with.
    With `answer`, if all are right and of one length, that is - G times the gradient of E[steps]; `block` and
    `position` leave out what a decision does to other blocks or positions. Being wrong saves nothing.
    """
    counts: dict[int, list[int]] = {}  # by index of a right answer: what counts for each token
    for i, g in enumerate(graded):
        if g.correct:
            counts[i] = counted_steps(g.rollout, g.block_size, config.credit_per)
    credits = [[0.0] * len(g.rollout.steps) for g in graded]
    steps = [graded[i].rollout.num_steps for i in counts]
    if len(steps) < 2 or (config.advantage_std and len(set(steps)) == 1):
        return credits
    unit = statistics.pstdev(steps) if config.advantage_std else 1.0
    for i, own in counts.items():
        for t, count in enumerate(own):
            others = [other[t] for j, other in counts.items() if j != i and t < len(other)]
            if others:
                credits[i][t] = config.speed_credit * (statistics.fmean(others) - count) / unit
    return credits


def counted_steps(rollout: Rollout, block_size: int, per: str) -> list[int]:
    """For each token of a response the number of steps that `speed_credits` compares.

    Block size 4, two prompt tokens in the first block:

        steps       2 1   3 4 3 4
        answer      4 4   2 2 2 2
        block       2 2   2 2 2 2
        position    2 1   1 2 1 2
    """
    first: dict[int, int] = {}  # step of each block
    blocks = [(len(rollout.prompt_ids) + t) // block_size for t in range(len(rollout.steps))]
    for block, step in zip(blocks, rollout.steps, strict=True):
        first[block] = min(step, first.get(block, step))
    last = max(rollout.steps) + 1
    counts = []
    for block, step in zip(blocks, rollout.steps, strict=True):
        end = {"answer": last, "block": first.get(block + 1, last), "position": step + 1}[per]
        counts.append(end - first[block])
    return counts


# -------------------------------------------------------------------------- rolling out


def collect_groups(
    engine: Engine,
    policy: BlockDiffusion,
    tokenizer: PreTrainedTokenizerFast,
    questions: list[Question],
    order: DataOrder,
    config: DiPOConfig,
    open_groups: list[OpenGroup],
) -> tuple[list[Group], dict[str, float]]:
    """Ask questions until all ranks together have `config.groups` useful groups (DAPO), or long enough.

    Each group ends within max_tokens / partial_tokens steps: plumbing.open_groups.Rounds.

    Args:
        policy: its weights go to an engine that had to be started again.
        open_groups: this rank's from earlier steps; afterwards those for later ones.

    Returns:
        This rank's useful groups, and figures over *all* rollouts of all ranks, useful or not.

    Raises:
        InputError: no useful group within config.max_rounds rounds, and none is open.
    """
    rank, world = rank_and_world()
    kept, sums, rounds = [], Counter(), Rounds(config)  # of this rank; over all ranks; the same on all
    while True:
        more, goes_on = rounds.next(sums["groups"], sums["useful"], open_groups)
        if not more and not goes_on:
            break
        new = order.take(more)

        # This rank's share of them, and what goes on. Groups whose rewards are all the same teach nothing.
        going, waiting = (open_groups[:], []) if goes_on else ([], open_groups[:])
        groups = sample_groups(engine, policy, tokenizer, questions, new[rank::world], config, going)
        open_groups[:] = waiting + going
        kept += [g for g in groups if g.useful]
        sums.update(sum_over_ranks(count_rollouts(groups)))  # a Counter adds
    if not sums["useful"]:
        raise InputError(
            f"{config.data}: no useful group among {sums['groups']:.0f} questions in {rounds.done - 1} "
            "rounds: all rollouts of a question had the same reward or verdict (too easy, too hard, or "
            "max_tokens too small)"
        )
    # Per rollout that has ended, where not said otherwise; response_tokens are those that the user sees.
    return kept, {
        "reward": sums["reward"] / sums["rollouts"],
        "reward_kept": sums["useful_reward"] / (sums["useful"] * config.group_size),
        "accuracy": sums["correct"] / sums["rollouts"],
        "tpf": sums["tokens"] / sums["steps"],
        "response_tokens": sums["shown"] / sums["rollouts"],
        "truncation_rate": sums["truncated"] / sums["rollouts"],
        "groups_kept": int(sums["useful"]),
        "groups_asked": rounds.asked,
        "kept_rate": sums["useful"] / sums["groups"],
        "rollout_tokens": int(sums["tokens"]),
    }


def count_rollouts(groups: list[Group]) -> dict[str, float]:
    """This rank's sums over the rollouts of a round."""
    graded = [g for group in groups for g in group.graded]
    useful = [group for group in groups if group.useful]
    return {
        "groups": len(groups),
        "useful": len(useful),
        "rollouts": len(graded),
        "reward": sum(sum(group.totals) for group in groups),
        "useful_reward": sum(sum(group.totals) for group in useful),
        "correct": sum(g.correct for g in graded),
        "truncated": sum(g.truncated for g in graded),
        "tokens": sum(len(g.rollout.response_ids) for g in graded),
        "shown": sum(g.rollout.num_tokens for g in graded),
        "steps": sum(g.rollout.num_steps for g in graded),
    }


def rollout_seeds(number: int, config: DiPOConfig) -> range:
    """Seeds of a question's rollouts: 23 bits of the run's, 40 of the rollout's running number."""
    first = ((config.seed % 2**23) << 40) + number * config.group_size
    return range(first, first + config.group_size)


def sample_groups(
    engine: Engine,
    policy: BlockDiffusion,
    tokenizer: PreTrainedTokenizerFast,
    questions: list[Question],
    asked: list[tuple[int, int]],
    config: DiPOConfig,
    going: list[OpenGroup] | None = None,
) -> list[Group]:
    """Roll out G rollouts of each question that is asked, (running number, index), and grade what has ended.

    Args:
        going: groups to go on with, before these; afterwards the groups that have not ended.
    """
    # G requests per question, each with a seed.
    going = [] if going is None else going
    going += [OpenGroup(number, index, [None] * config.group_size) for number, index in asked]
    requests = []
    for group in going:
        turn = config.prompt.replace("{question}", questions[group.index].text)
        prompt, seeds = encode_prompt(tokenizer, turn), rollout_seeds(group.number, config)
        requests += [Request(seeds[i], group.index, prompt, group.rollouts[i]) for i in group.unfinished]

    # What has ended is graded while others are generated.
    def grade_some(ended: list[tuple[Rollout, int]]) -> list[Graded]:
        rollouts, indices = zip(*ended, strict=True)
        of = [questions[index] for index in indices]
        return grade(rollouts, of, tokenizer, engine.block_size, config.max_tokens)

    ahead = Ahead(grade_some)
    for group in going:
        for rollout in group.rollouts:
            if rollout and rollout.finish_reason != "unfinished":
                ahead.add(rollout.seed, (rollout, group.index))
    unfinished, graded = make_rollouts(engine, policy, requests, config, ahead)

    # Groups that have ended, with rewards and advantages.
    groups = []
    with together():
        for group in going:
            seeds = rollout_seeds(group.number, config)
            group.rollouts = [graded[s].rollout if s in graded else unfinished[s] for s in seeds]
            if not group.unfinished:
                groups.append(make_group(group.number, [graded[s] for s in seeds], config))
    going[:] = [group for group in going if group.unfinished]
    return groups


def make_rollouts(
    engine: Engine, policy: BlockDiffusion, requests: list[Request], config: DiPOConfig, ahead: Ahead
) -> tuple[dict[int, Rollout], dict[int, Graded]]:
    """Rollouts of this rank's requests that have not ended, by seed, and all that are graded.

    With config.even_ranks any rank may make any of them; each comes back to the rank that asked for it.

    Args:
        ahead: grades (rollout, index of the question) by seed; it has those that ended earlier.
    """
    # The requests of all ranks in one queue, or each rank its own.
    total, queue = len(requests), SharedQueue(requests, engine.max_batch) if config.even_ranks else None
    requests = queue.requests if queue else requests
    index_of = {request.seed: request.index for request in requests}
    unfinished = {}

    def stopped(rollout: Rollout) -> None:
        bar.update()
        if rollout.finish_reason == "unfinished":
            unfinished[rollout.seed] = rollout
        else:
            ahead.add(rollout.seed, (rollout, index_of[rollout.seed]))

    # This rank's engine makes its part.
    prompts, seeds = [request.prompt for request in requests], [request.seed for request in requests]
    begun = [request.begun for request in requests]
    how = Decoding.from_config(config, holds=config.likelihood == "exact")
    quiet, weights = rank_and_world()[0] > 0, lambda: named_weights(policy)
    with progress(total=total, desc="rollouts", unit="rollout", leave=False, disable=quiet) as bar:
        generate_all(engine, prompts, seeds, how, stopped, weights, begun, queue)
    graded = ahead.results()
    if queue:
        unfinished, graded = queue.bring_home(unfinished), graded | queue.bring_home(graded)
    return unfinished, graded


# ----------------------------------------------------------------------------- the loss


def dipo_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    config: DiPOConfig,
    reference_logprobs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped surrogate of the actions of one row, to be added over all rows of the batch.

    Args:
        logprobs, old_logprobs: [M] of each action, under the policy now and when it was sampled.
        advantages: [M] of the action: its trajectory's, plus the credit of its token.
        weights: [M] the normaliser, see `action_weight`.
        reference_logprobs: [M] under the reference, if config.kl_beta is not 0.

    Returns:
        The loss, and sums over actions: how many were clipped, policy_kl = KL(old || now), and kl =
        KL(now || reference).
    """
    # Beyond the clip range an action that got better adds no gradient; one that got worse still does.
    log_ratio = logprobs - old_logprobs  # [M]
    if config.log_ratio_clamp:
        log_ratio = log_ratio.clamp(-config.log_ratio_clamp, config.log_ratio_clamp)
    ratio = log_ratio.exp()  # [M]
    clipped_ratio = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)  # [M]
    surrogate = torch.minimum(ratio * advantages, clipped_ratio * advantages)  # [M]
    loss = -(weights * surrogate).sum()
    sums = {
        "clipped": (clipped_ratio * advantages < ratio * advantages).sum(),
        "policy_kl": k3(old_logprobs, logprobs.detach()).sum(),
    }

    # The pull towards the reference, with the same weights.
    if reference_logprobs is not None:
        kl = k3(logprobs, reference_logprobs)  # [M]
        loss = loss + config.kl_beta * (weights * kl).sum()
        sums["kl"] = kl.detach().sum()
    return loss, sums


def k3(logprobs: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 estimator of KL(policy || other) on actions drawn from the policy; never < 0."""
    log_ratio = other - logprobs
    return log_ratio.exp() - log_ratio - 1


def action_weight(
    config: DiPOConfig, group: Group, trajectory_tokens: int, all_groups: float, all_tokens: float
) -> float:
    """Weight of each action of a trajectory with so many tokens; all_groups, all_tokens: over all ranks.

    group: sum over the group / its tokens, then mean over groups (DiRL, eq. 7); batch: sum / all
    tokens (DAPO); sequence: mean per trajectory, then mean over all (DiRL, eq. 6). Tokens are counted, not
    actions, so that both likelihoods are on one scale.
    """
    if config.normalizer == "group":
        return 1 / (group.trajectory_tokens * all_groups)
    if config.normalizer == "batch":
        return 1 / all_tokens
    return 1 / (trajectory_tokens * config.group_size * all_groups)


def engine_gap(trainer: torch.Tensor, engine: torch.Tensor, held: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums and maximum of |trainer - engine| log-probability over reveals, and its k3-KL.

    Both scored the same tokens in the same states, so in float32 it is rounding (< 1e-4). It grows
    if mask, positions, cache, step map, temperature or a stale weight disagree. The guard looks at the
    mean of the capped one, to which a single token, however far off, adds 1 at most.
    """
    ours, theirs = trainer[~held], engine[~held]
    gap = (ours - theirs).abs()
    hold_gap = (trainer - engine)[held].abs().clamp(max=1.0)
    return {
        "gap": gap.sum(),
        "gap_capped": gap.clamp(max=1.0).sum(),
        "gap_holds": hold_gap.sum(),
        "gap_kl": k3(theirs, ours).sum(),
        "reveals": (~held).sum(),
        "gap_max": gap.max().item() if len(gap) else 0.0,
    }


def correction_weights(
    trainer: torch.Tensor, engine: torch.Tensor, held: torch.Tensor, config: DiPOConfig
) -> torch.Tensor:
    """Constant weights [M] of the actions, by the ratio rho = pi / mu of trainer and engine for each.

    The engine drew from mu, its own rounding of the trainer's policy pi, both as they were before the first
    update. By config.correction an action weighs

        none        1 if it is a reveal, min(rho, 1) if a hold
        truncate    min(rho, correction_high)             truncated importance sampling (Yao et al. 2025)
        mask        rho between the bounds, else 0        IcePop (2510.18855), there from 0.5 to 5

    Let J(s, j) be the expected advantage if in state s the action at position j is drawn from pi, and all
    else from mu. Since mu rho = pi, `truncate` with a bound that no ratio reaches has the gradient of the sum
    of J(s, j) over all s and j: to first order in pi - mu that sum changes as J(pi) does, and a constant
    advantage has no gradient. It is not the gradient of J(pi) itself, as states and continuations remain
    mu's: that one takes the product of all ratios of a trajectory, whose variance grows exponentially with
    its length. So the literature has ratios per token, here per action. `none` has the gradient of no J, not
    even of a constant. Bounds leave out, or shrink, the actions beyond them: bias for variance.
    (Before the clip, with likelihood=exact; all are enumerated in tests/test_correction.py.)

    It holds as long as rounding moves no token over a bound: a hold is a set of tokens. If two sure
    positions are in another order for the trainer, the mass below the bound falls from nearly 1 to nearly 0
    at once, and the gradient of a log near 0 is as large as that of all reveals of the block. So even `none`
    truncates the ratio of holds, at 1 (Ionides 2008); a reveal's differs by the rounding only.
    """
    ratio = (trainer - engine).exp()
    if config.correction == "none":
        return torch.where(held, ratio.clamp(max=1.0), 1.0)
    if config.correction == "truncate":
        return ratio.clamp(max=config.correction_high)
    return torch.where((ratio >= config.correction_low) & (ratio <= config.correction_high), ratio, 0.0)


def correction_sums(old: torch.Tensor, engine: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums over actions for the metrics of config.correction, given the weight of each [M]."""
    ratio = (old - engine).exp()
    sums = {"ratios": len(ratio), "ratio": ratio.sum(), "ratio_squared": ratio.square().sum()}
    return sums | {"corrected": (weight != ratio).sum()}


# ------------------------------------------------------------------------------ training


@dataclass
class Row:
    """A packed row to train on, with the log-probabilities that are constants of its loss."""

    packed: Packed
    old_logprobs: torch.Tensor | None  # [M] of the policy that sampled; None: the policy has not moved since
    reference_logprobs: torch.Tensor | None  # [M] of the reference; None: there is none


class Weighted(NamedTuple):
    """A rollout on its way to the rank that trains on it."""

    rollout: Rollout
    weight: float  # of each of its actions, from counts over all ranks: dealing does not change it
    advantages: list[float]  # per token


def pack_groups(groups: list[Group], config: DiPOConfig, block_size: int, mask_id: int) -> list[Packed]:
    """This rank's even share of all ranks' rollouts as packed rows, replayed view by view."""
    # What this rank rolled out, with the numbers that go into `Packed.weights` and `Packed.advantages`.
    counts = {"groups": len(groups), "tokens": sum(g.trajectory_tokens for g in groups)}
    counts = sum_over_ranks(counts)
    own, sizes = [], []
    for group in groups:
        for i, (graded, advantage) in enumerate(zip(group.graded, group.advantages, strict=True)):
            rollout = graded.rollout
            tokens = len(rollout.response_ids)
            weight = action_weight(config, group, tokens, counts["groups"], counts["tokens"])
            credits = group.credits[i] if group.credits else [0.0] * tokens
            own.append(Weighted(rollout, weight, [advantage + credit for credit in credits]))
            sizes.append(len(rollout.prompt_ids) + tokens + block_size * rollout.num_steps)  # clean, views

    # What this rank trains on, in rows of similar size on all ranks.
    dealt, plan = deal(own, sizes, config.token_budget)
    exact = config.likelihood == "exact"
    views = [replay(w.rollout, block_size, w.weight, exact, w.advantages) for w in dealt]
    return pack(views, block_size, mask_id, config.token_budget, plan)


def pack_certainty(groups: list[Group], config: DiPOConfig, block_size: int, mask_id: int) -> list[Packed]:
    """Rows for the auxiliary loss of config.certainty: right answers, at positions that are masked.

    It is the loss of SFT on own answers, not the policy gradient of any reward: what the decoder wrote in
    many steps shall be sure in few. `weights` of the rows of all ranks add up to config.certainty (with
    certainty_at=noise on average over the noise), as those of the policy's reveals add up to 1. No rows on
    any rank if no answer is right. Source: LightningRL (2603.13319), whose NLL is over masked blocks.
    """
    # The views of this rank's right answers.
    own, tokens = [], 0
    for group in groups:
        right = [g.rollout for g in group.graded if g.correct]
        if config.certainty_on == "fast" and right:
            mean = statistics.fmean(r.tokens_per_forward for r in right)
            right = [r for r in right if r.tokens_per_forward >= mean]
        for rollout in right:
            ids, prompt = rollout.prompt_ids + rollout.response_ids, len(rollout.prompt_ids)
            if config.certainty_at == "first":
                views = all_masked(ids, prompt, block_size)
            else:
                rng = np.random.default_rng([config.seed, 2, rollout.seed])
                views = noise(ids, prompt, block_size, rng, views=2, complementary=True)
            own.append(views)
            tokens += len(rollout.response_ids)

    # The mean over the tokens of all ranks, in rows of similar size on all of them.
    tokens = sum_over_ranks({"tokens": tokens})["tokens"]
    if not tokens:
        return []
    for views in own:
        views.weights = views.weights * config.certainty / tokens
    dealt, plan = deal(own, [views.num_tokens for views in own], config.token_budget)
    return pack(dealt, block_size, mask_id, config.token_budget, plan)


def accumulate_certainty(policy: BlockDiffusion, rows: list[Packed], config: DiPOConfig) -> float:
    """Add the gradient of the auxiliary loss over all rows of all ranks, of which there are some.

    Returns:
        The metric certainty_nll: the loss per unit of its weight, in nats per masked token of right answers,
        under the softmax at temperature 1, over all ranks, before the last update.
    """
    (rank, world), total = rank_and_world(), 0.0
    for number, packed in enumerate(micro_batches(policy, rows, config.reduce_once), start=1):
        loss = -(packed.weights * policy.score(packed, Sampling()).logprobs).sum()
        (loss * world).backward()
        total += noted(loss.item(), f"certainty of row {number} of {len(rows)} on rank {rank}")
    return sum_over_ranks({"loss": total})["loss"] / config.certainty


def policy_sampling(config: DiPOConfig) -> Decoding:
    """The policy that is trained: what rollouts were sampled from, or the softmax before top-k and top-p."""
    uncut = {"top_k": 0, "top_p": 1.0} if config.train_on == "softmax" else {}
    return Decoding.from_config(config, **uncut)


@torch.no_grad()
def score_rows(
    packs: list[Packed], policy: BlockDiffusion, reference: BlockDiffusion | None, config: DiPOConfig
) -> list[Row]:
    """The rows, with the log-probabilities that are constants of their loss.

    The old ones are the trainer's own (not the engine's, which rounds otherwise), taken before the first
    update. With one update per batch the policy is still that one: ratios are 1, and no extra pass is made.
    Tokens of earlier steps have the engine's, since no trainer has their weights any more.
    """
    how, rows = policy_sampling(config), []
    for packed in packs:
        old = policy.score(packed, how).logprobs if config.updates > 1 else None
        of_reference = reference.score(packed, how).logprobs if reference is not None else None
        rows.append(Row(packed, old, of_reference))
    reshard(policy, reference)  # else embedding and head stay gathered, the reference's for good
    return rows


def accumulate_gradients(
    policy: BlockDiffusion, rows: list[Row], config: DiPOConfig, first_update: bool
) -> list[dict[str, float]]:
    """Add the gradient of the loss over all rows of all ranks.

    Returns:
        For every row of this rank, sums over its actions: those of dipo_loss, loss, entropy, actions, holds;
        with the first update, before the policy moves, also train_tokens, ages (of reveals), and those of
        engine_gap and correction_sums for what this step's weights drew.
    """
    (rank, world), how, stats = rank_and_world(), policy_sampling(config), []
    bar = progress(desc="train", total=len(rows), unit="row", leave=False, disable=rank > 0)
    for row in micro_batches(policy, rows, config.reduce_once):  # gradients are reduced after the last one
        # Every action of the row under the policy now, in one pass.
        packed = row.packed
        scores = policy.score(packed, how)
        now, held = scores.logprobs.detach(), packed.targets == HOLD
        old = now if row.old_logprobs is None else row.old_logprobs
        fresh = packed.ages == 0  # from this step's weights; those of older tokens are gone: see score_rows
        old = torch.where(fresh, old, packed.engine_logprobs)
        correction = correction_weights(old, packed.engine_logprobs, held, config)
        weights = packed.weights * correction
        loss, sums = dipo_loss(
            scores.logprobs, old, packed.advantages, weights, config, row.reference_logprobs
        )
        (loss * world).backward()  # FSDP2 averages over ranks, the loss is a sum over them

        # Sums for metrics.jsonl.
        sums |= {"loss": loss.detach(), "entropy": scores.entropy.sum()}
        sums |= {"actions": len(packed.scored), "holds": held.sum()}
        if first_update:
            sums |= {"train_tokens": len(packed), "ages": packed.ages[~held].sum()}
            sums |= engine_gap(now[fresh], packed.engine_logprobs[fresh], held[fresh])
            if config.correction != "none":
                sums |= correction_sums(old[fresh], packed.engine_logprobs[fresh], correction[fresh])
        stats.append({name: float(value) for name, value in sums.items()})
        noted(stats[-1]["loss"], f"loss of row {len(stats)} of {len(rows)} on rank {rank}")
        bar.update()
    bar.close()
    return stats


def training_metrics(stats: list[dict[str, float]], config: DiPOConfig) -> dict[str, float]:
    """Figures over all actions of all ranks, from the sums per row of `accumulate_gradients`."""
    sums: dict[str, float] = {}
    gap_max = 0.0
    for of_row in stats:
        gap_max = max(gap_max, of_row.get("gap_max", 0.0))
        for name, value in of_row.items():
            if name != "gap_max":
                sums[name] = sums.get(name, 0.0) + value
    sums, gap_max = sum_over_ranks(sums), max(gather(gap_max))
    metrics = {
        "loss": sums["loss"] / config.updates,
        "entropy": sums["entropy"] / sums["actions"],
        "clip_fraction": sums["clipped"] / sums["actions"],
        "policy_kl": sums["policy_kl"] / sums["actions"],
        "hold_fraction": sums["holds"] / sums["actions"],
        "gap_mean": sums["gap"] / sums["reveals"],
        "gap_max": gap_max,
        "gap_capped": sums["gap_capped"] / sums["reveals"],
        "gap_kl": sums["gap_kl"] / sums["reveals"],
        "gap_holds": sums["gap_holds"] / max(sums["holds"], 1),
        "train_tokens": int(sums["train_tokens"]),
    }
    metrics |= {"kl": sums["kl"] / sums["actions"]} if "kl" in sums else {}
    if config.correction != "none":  # mean ratio, effective sample size as a share, share out of bounds
        metrics["correction_ratio"] = sums["ratio"] / sums["ratios"]
        metrics["correction_ess"] = sums["ratio"] ** 2 / (sums["ratios"] * sums["ratio_squared"])
        metrics["correction_share"] = sums["corrected"] / sums["ratios"]
    if config.partial_tokens:
        metrics["age"] = sums["ages"] * config.updates / (sums["actions"] - sums["holds"])
    return metrics


# ------------------------------------------------------------------------------ the loop


def rollout_records(groups: list[Group], step: int, count: int) -> list[dict]:
    """The first rollout of each of `count` groups, for rollouts.jsonl."""
    records = []
    for group in groups[:count]:
        record = group.graded[0].to_record() | {"step": step, "rewards": group.rewards[0]}
        records.append(record | {"advantage": group.advantages[0]})
    return records


def main(config: DiPOConfig) -> None:
    """The DiPO loop: roll out, replay, update, hand over the weights."""
    # The run's folder knows three checkpoints: `initial`, where the run began; `weights`, its newest if it
    # is resumed; and `base`, from where the policy is loaded, which differs from `weights` with LoRA only.
    rank, _, device = start_distributed()
    questions = read_questions(config.data)
    folder = RunFolder(config)
    tokenizer = load_tokenizer(folder.weights)

    # The policy, sharded over the ranks by FSDP2 under torchrun, and perhaps the reference of the KL.
    check_memory(config, folder.base)
    policy = load_for_training(folder.base, device, config)
    block_size, mask_id = choose_block_size(config.block_size, policy.config), tokenizer.mask_token_id
    reference = None
    if config.kl_beta:
        reference = load_for_training(folder.initial, device, config).requires_grad_(False)
    optimizer = make_optimizer(policy, config)
    folder.restore(policy, optimizer)

    # The engine of this rank, and what watches over it and over the numbers.
    engine = make_engine(folder.weights, tokenizer, block_size, config, folder.engine_log)
    guard = Guard(config, engine.dtype)

    # The questions, and their order, which goes on where a resumed run stopped.
    questions = fitting_questions(questions, tokenizer, engine, config, config.max_tokens)
    order = DataOrder(len(questions), config.seed, folder.cursor)
    if config.eval_every:
        eval_questions = read_questions(config.eval_data)[: config.eval_limit or None]
        eval_questions = fitting_questions(eval_questions, tokenizer, engine, config, config.eval_max_tokens)

    open_groups = read_groups(folder.unfinished(), Rollout)
    bar = progress(total=config.steps, initial=folder.step, desc="dipo", unit="step", disable=rank > 0)
    for step in range(folder.step + 1, config.steps + 1):
        # Roll out and grade, until enough groups have a spread of rewards; their advantages come with them.
        watch = Stopwatch()
        with watch("rollout"):
            try:
                groups, metrics = collect_groups(
                    engine, policy, tokenizer, questions, order, config, open_groups
                )
            except InputError:  # the last step that was done
                folder.save(step - 1, order.cursor, policy, optimizer, map(asdict, open_groups))
                raise

        with watch("train"):
            # The engine gives its memory (weights and cache) to the trainer.
            metrics |= to_trainer(engine)

            # Replay every decision as the decoder saw it, in packed rows dealt out evenly to the ranks.
            packs = [p.to(device) for p in pack_groups(groups, config, block_size, mask_id)]
            rows = score_rows(packs, policy, reference, config)
            sure = pack_certainty(groups, config, block_size, mask_id) if config.certainty else []
            sure = [p.to(device) for p in sure]
            stats = []
            for update in range(config.updates):
                # The policy gradient of all rows: forward and backward, summed over the ranks.
                stats += accumulate_gradients(policy, rows, config, first_update=update == 0)
                metrics |= training_metrics(stats, config)
                if sure:
                    metrics["certainty_nll"] = accumulate_certainty(policy, sure, config)

                # One optimizer step, if all numbers are in order.
                norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
                updates_done = (step - 1) * config.updates + update
                metrics["grad_norm"] = gathered(norm).item()
                metrics["lr"] = lr_at(config, updates_done, config.steps * config.updates)
                if guard.allows(step, metrics):
                    set_lr(optimizer, metrics["lr"])
                    optimizer.step()
                optimizer.zero_grad()
            if config.partial_tokens:
                metrics |= grow_older(open_groups, config.updates, config.max_age)

        # The trainer gives back all but weights and moments; the engine gets the new weights, in place.
        with watch("update_weights"):
            metrics |= to_engine(engine, named_weights(policy))
        if due(config.eval_every, step, config.steps):
            with watch("evaluate"):
                metrics |= evaluate_now(
                    engine, tokenizer, eval_questions, config, weights=lambda: named_weights(policy)
                )

        # On record.
        folder.log(step, metrics | watch.seconds)
        folder.append("rollouts.jsonl", rollout_records(groups, step, config.log_rollouts))
        bar.set_postfix(accuracy=f"{metrics['accuracy']:.3f}", tpf=f"{metrics['tpf']:.2f}")
        bar.update()
        if due(config.save_every, step, config.steps) or step == config.steps:
            folder.save(step, order.cursor, policy, optimizer, map(asdict, open_groups))
    bar.close()
    engine.close()
    folder.close()


if __name__ == "__main__":
    run_script(main, CONFIG)
