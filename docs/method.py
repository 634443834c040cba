"""Draws the small figures of README's method and of docs/afternoon.md into docs/method.

    python docs/method.py                        # all of them
    python docs/method.py surrogate hold_mass    # some; --out FOLDER: elsewhere

Every figure is a function that computes with the repository's own functions, draws to a PNG, and returns
the numbers that it drew (tests/test_method.py recomputes them).
"""

from __future__ import annotations

import io
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib  # noqa: E402

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.patches import Patch, Rectangle  # noqa: E402
from PIL import Image  # noqa: E402

import reward  # noqa: E402
from dipo import DiPOConfig, dipo_loss, group_advantages  # noqa: E402
from masking import Trajectory, dense_mask, noise, pack, replay  # noqa: E402
from plumbing.common import run_script  # noqa: E402
from plumbing.config import Parser, folder_name  # noqa: E402
from rollout import Decoding, held_mass, reveal  # noqa: E402

# As in the picture of masking.py: clean or known, a view's look at the clean copy, of itself, scored.
EMPTY, CLEAN, SEEN, VIEW, SCORED, DARK = "#f4f4f4", "#4878a8", "#8fbf7f", "#e08a3c", "#c03030", "#404040"
WIDTH = 5.0  # inches; shown at 400 pixels, a point of a letter is 1.1 pixels
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",  # also on a dark page
    "figure.constrained_layout.use": True,
}
QUESTION, ANSWER = "8?", "3+8=11"  # the end of a prompt opens the block that the answer goes on in
STEPS = [2, 1, 3, 3, 4, 3]  # the answer's step map


# ------------------------------------------------------------------------- rows of tokens


def packed_row(path: Path) -> dict[str, Any]:
    """Who sees whom in a packed row: six tokens in blocks of 2, four of them decoded in three steps."""
    trajectory = Trajectory([1, 2], [3, 4, 5, 6], [1, 2, 3, 3], [0.0] * 4)
    (row,) = pack([replay(trajectory, 2, weight=1.0)], 2, mask_id=0, token_budget=99)
    seen = dense_mask(row)
    labels = ["_abcdef"[i] for i in row.ids.tolist()]

    # The colour of a pair says which line of the rule makes it visible.
    clean = row.view == 0
    which = torch.where(clean[None], torch.where(clean[:, None], 1, 2), 3) * seen
    colours = matplotlib.colors.ListedColormap([EMPTY, CLEAN, SEEN, VIEW])
    figure = plt.figure(figsize=(WIDTH, 4.1), layout="none")
    axes = figure.add_axes((0.05, 0.08, 0.67, 0.86))
    axes.imshow(which.numpy(), cmap=colours, vmin=0, vmax=3)
    axes.set_xticks(range(len(row)), labels, fontsize=11)
    axes.set_yticks(range(len(row)), labels, fontsize=11)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(True)
    for position in row.scored.tolist():
        axes.get_yticklabels()[position].set(color=SCORED, fontweight="bold")

    # Borders of segments, with names on the right.
    for start in range(0, len(row), row.block_size):
        view, block = int(row.view[start]), int(row.block[start])
        wide = view > 0
        for line in (axes.axhline, axes.axvline):
            line(start - 0.5, color="black" if wide else "white", lw=1)
        name = f"view {view} (block {block})" if view else f"clean block {block}"
        axes.text(len(row) - 0.3, start + 0.5, name, va="center")
    names = {CLEAN: "clean sees clean", SEEN: "view sees earlier clean", VIEW: "view sees itself"}
    handles = [Patch(color=c, label=n) for c, n in names.items()]
    figure.legend(handles=handles, loc="lower center", ncol=3, frameon=False, handlelength=1.2)
    _save(figure, path)
    return {"row": row, "seen": seen}


def replayed_views(path: Path) -> dict[str, Any]:
    """The views of one response, step by step, from its step map."""
    trajectory = Trajectory(list(map(ord, QUESTION)), list(map(ord, ANSWER)), STEPS, [0.0] * len(ANSWER))
    views = replay(trajectory, 4, weight=1.0)
    text = QUESTION + ANSWER
    rows = [("clean", 0, [(letter, CLEAN) for letter in text])]
    for number, (block, masked, scored) in enumerate(
        zip(views.block, views.masked, views.is_scored, strict=True), 1
    ):
        cells = [(letter, SEEN) for letter in text[: block * 4]]
        for letter, hidden, now in zip(text[block * 4 :], masked, scored, strict=False):
            cells.append((letter, VIEW) if now else ("_", EMPTY) if hidden else (letter, CLEAN))
        rows.append((f"step {number}", 0, cells))
    figure, axes = plt.subplots(figsize=(WIDTH, 3.0))
    _cells(axes, rows, len(text), 4)
    names = {CLEAN: "known", EMPTY: "masked, holds", VIEW: "masked, revealed now", SEEN: "clean, seen"}
    handles = [Patch(facecolor=c, edgecolor="0.6", label=n) for c, n in names.items()]
    figure.legend(handles=handles, **_below(2))
    _save(figure, path)
    return {"steps": STEPS, "views": views}


def sft_noise(path: Path) -> dict[str, Any]:
    """Noised copies of a training text, in pairs that mask each other's complement."""
    text, prompt = "3+8?3+8=11 {11}.", 4  # the full stop is the end
    copies = []
    for seed in (1, 2):
        rng = np.random.default_rng(seed)
        views = noise(list(map(ord, text)), prompt, 4, rng, views=2, complementary=True)
        for weight in dict.fromkeys(
            views.weights[:, 0]
        ):  # the two copies of a pair have weights of their own
            masked = np.zeros(len(text), bool)
            for block, mask, weights in zip(views.block, views.masked, views.weights, strict=True):
                if weights[0] == weight:
                    masked[block * 4 : block * 4 + 4] = mask
            copies.append({"weight": float(weight), "masked": masked, "seed": seed})

    rows = [("clean", 0, [(letter, CLEAN) for letter in text])]
    for number, copy in enumerate(copies):
        cells = []
        for i, (letter, hidden) in enumerate(zip(text, copy["masked"], strict=True)):
            cells.append(("_", VIEW) if hidden else (letter, SEEN if i < prompt else CLEAN))
        rows.append((f"t = {1 / (2 * copy['weight']):.2f}", 0.35 * (number // 2 + 1), cells))
    figure, axes = plt.subplots(figsize=(WIDTH, 2.6))
    _cells(axes, rows, len(text), 4)
    names = {SEEN: "prompt, never masked", CLEAN: "known", VIEW: "masked, weight 1/t"}
    figure.legend(handles=[Patch(color=c, label=n) for c, n in names.items()], **_below(3))
    _save(figure, path)
    return {"text": text, "prompt": prompt, "copies": copies}


def _cells(axes: plt.Axes, rows: list[tuple[str, float, list]], columns: int, block: int) -> None:
    """A line of squares per row: (name, extra distance from the top, [(letter, colour), ...])."""
    for number, (name, extra, cells) in enumerate(rows):
        y = number * 1.15 + extra + (0.35 if number else 0)
        axes.text(-0.4, y, name, ha="right", va="center")
        for i, (letter, colour) in enumerate(cells):
            x = i + 0.25 * (i // block)
            axes.add_patch(Rectangle((x, y - 0.45), 0.92, 0.9, facecolor=colour, edgecolor="0.6", lw=0.6))
            ink = "0.45" if colour == EMPTY else "white" if colour == CLEAN else "black"
            axes.text(x + 0.46, y, letter, ha="center", va="center", color=ink, fontsize=12)
    axes.set(xlim=(-3.2 * columns / 16 - 1, columns + 0.25 * (columns // block)), ylim=(y + 0.6, -0.6))
    axes.axis("off")


# ----------------------------------------------------------------------- decoding and holds


def decoding(path: Path) -> dict[str, Any]:
    """One block, three denoising steps: confidences, the threshold, and what is revealed."""
    how = Decoding(rule="dynamic", threshold=0.9)
    text, drawn = "3+8=", [(0.62, 0.98, 0.55, 0.97), (0.71, 1.0, 0.64, 1.0), (1.0, 1.0, 0.93, 1.0)]
    masked, steps = torch.ones(4, dtype=torch.bool), []
    figure, panels = plt.subplots(1, 3, figsize=(WIDTH, 2.5), sharey=True)
    for number, (axes, confidence) in enumerate(zip(panels, drawn, strict=True), 1):
        revealed = reveal(torch.tensor(confidence).log(), masked, how)
        steps.append({"confidence": confidence, "masked": masked.tolist(), "revealed": revealed.tolist()})
        for j, c in enumerate(confidence):
            if masked[j]:
                style = (
                    {"color": VIEW}
                    if revealed[j]
                    else {"facecolor": "white", "edgecolor": "0.5", "hatch": "///"}
                )
                axes.bar(j, c, width=0.8, **style)
            else:
                axes.text(j, 0.06, "known", rotation=90, ha="center", color=CLEAN)
        axes.axhline(how.threshold, color=SCORED, lw=1.2, ls="--")
        axes.set_xticks(range(4), list(text), fontsize=12)
        axes.set(title=f"step {number}", xlim=(-0.6, 3.6), ylim=(0, 1.08))
        for j, tick in enumerate(axes.get_xticklabels()):
            tick.set(color=CLEAN if not masked[j] else "black")
        masked = masked & ~revealed
    panels[0].set(ylabel="confidence of the draw", yticks=[0, 0.5, how.threshold])
    handles = [
        Patch(color=VIEW, label="revealed"),
        Patch(facecolor="white", edgecolor="0.5", hatch="///", label="held: thrown away"),
    ]
    handles.append(plt.Line2D([], [], color=SCORED, ls="--", label="threshold"))
    figure.legend(handles=handles, **_below(3))
    _save(figure, path)
    return {"threshold": how.threshold, "steps": steps}


def hold_mass(path: Path) -> dict[str, Any]:
    """The probability of a hold: the mass of all tokens less probable than the bound."""
    p, shown = [0.40, 0.25, 0.15, 0.10, 0.06, 0.04], 0.2
    log_p, bounds = torch.tensor(p).log(), [i / 400 for i in range(1, 221)]
    mass = held_mass(log_p.expand(len(bounds), -1), log_p, torch.tensor(bounds).log(), Decoding()).exp()
    (at_shown,) = held_mass(log_p[None], log_p, torch.tensor([shown]).log(), Decoding()).exp().tolist()

    # Left the distribution, with the tokens whose draws are held; right the mass as the bound moves.
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.5), width_ratios=(1, 1.15))
    left.bar(range(len(p)), p, color=[VIEW if c < shown else CLEAN for c in p])
    left.axhline(shown, color=SCORED, lw=1.2, ls="--")
    left.text(len(p) - 0.5, shown + 0.01, "bound", color=SCORED, ha="right")
    left.text(3.3, 0.115, f"held: {at_shown:.2f}", ha="left", color="#b05a10", fontweight="bold")
    left.set_xticks(range(len(p)), list("abcdef"))
    left.set(ylabel="p of a token", xlabel="token", ylim=(0, 0.45))
    right.plot(bounds, mass, color=DARK, lw=1.8, drawstyle="steps-post")
    right.plot([shown], [at_shown], "o", color=VIEW, ms=8, zorder=3)
    right.axvline(shown, color=SCORED, lw=1.2, ls="--", zorder=0)
    right.set(xlabel="bound (confidence)", ylabel="mass of the hold", ylim=(0, 1.08), xlim=(0, 0.55))
    right.grid(alpha=0.3)
    _save(figure, path)
    return {"p": p, "bounds": bounds, "mass": mass.tolist(), "shown": shown, "at_shown": at_shown}


# ------------------------------------------------------------------- advantages and the loss


def advantages(path: Path) -> dict[str, Any]:
    """Three groups of rewards and their advantages; the one without spread is dropped."""
    groups = [[1, 1, 0, 1], [0, 0, 1, 0], [1, 1, 1, 1]]
    found = []
    figure, axes = plt.subplots(2, 3, figsize=(WIDTH, 3.0), sharex=True, sharey="row")
    for number, rewards in enumerate(groups):
        values = [{"accuracy": float(r)} for r in rewards]
        found.append(group_advantages(values, [float(r) for r in rewards], DiPOConfig()))
        kept = any(found[-1])
        above, below = axes[:, number]
        above.bar(range(4), rewards, color=CLEAN if kept else "0.75", width=0.7)
        above.plot([-0.5, 3.5], [np.mean(rewards)] * 2, color=SCORED, lw=1.2, ls="--")
        above.set_title(f"question {number + 1}: {'kept' if kept else 'dropped'}")
        below.bar(range(4), found[-1], color=[SEEN if a > 0 else VIEW for a in found[-1]], width=0.7)
        below.axhline(0, color="0.5", lw=0.8)
        below.set_xticks(range(4), "1234")
        for i, a in enumerate(found[-1]):
            below.text(i, a + math.copysign(0.1, a), f"{a:+.1f}" if a else "0", ha="center", fontsize=9,
                       va="bottom" if a >= 0 else "top")  # fmt: skip
    axes[0, 0].set(ylabel="reward", yticks=[0, 1], ylim=(0, 1.15))
    axes[1, 0].set(ylabel="advantage", ylim=(-2.5, 2.5))
    axes[1, 1].set_xlabel("rollout of the group      (- -  mean reward)")
    _save(figure, path)
    return {"rewards": groups, "advantages": found}


def surrogate(path: Path) -> dict[str, Any]:
    """The clipped surrogate of one action over its ratio, and where it has no gradient."""
    config = DiPOConfig(clip_low=0.2, clip_high=0.28)
    ratios = torch.linspace(0.5, 1.6, 221)
    data: dict[str, Any] = {"ratios": ratios.tolist(), "low": config.clip_low, "high": config.clip_high}
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 2.6))
    for axes, sign in zip(panels, (1.0, -1.0), strict=True):
        # Loss and gradient of each action by itself: the actions of a row are added up.
        logprobs = ratios.log().requires_grad_()
        ones = torch.ones_like(ratios)
        every, _ = dipo_loss(logprobs, torch.zeros_like(ratios), sign * ones, ones, config)
        (gradient,) = torch.autograd.grad(every, logprobs)
        value = []
        for ratio in ratios:
            one = torch.ones(1)
            loss, _ = dipo_loss(ratio.log()[None], torch.zeros(1), sign * one, one, config)
            value.append(-loss.item())
        data["better" if sign > 0 else "worse"] = {"value": value, "gradient": gradient.tolist()}
        flat = gradient == 0
        axes.plot(ratios, sign * ratios, color="0.6", lw=1, ls=":")
        axes.plot(ratios, value, color=CLEAN, lw=2.4)
        axes.axvspan(float(ratios[flat].min()), float(ratios[flat].max()), color=VIEW, alpha=0.3, lw=0)
        edge = 1 + config.clip_high if sign > 0 else 1 - config.clip_low
        axes.axvline(edge, color=SCORED, lw=1.2, ls="--")
        axes.set(xlabel=r"ratio $\rho$", xticks=sorted([0.5, 1.0, 1.6, edge]), xlim=(0.5, 1.6))
        axes.set_title(f"A = {sign:+.0f}: stops at {edge:g}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(r"min($\rho$A, clip($\rho$)A)")
    figure.legend(handles=[Patch(color=VIEW, alpha=0.3, label="no gradient")], **_below(1))
    _save(figure, path)
    return data


# ---------------------------------------------------------------------------------- speed


def speed_reward(path: Path) -> dict[str, Any]:
    """The reward for speed against tokens per forward, of right and wrong answers; blocks of 4."""
    tokens = 600
    rollouts = [reward.example("x" * tokens, tokens / steps) for steps in range(tokens, tokens // 4 - 1, -5)]
    data: dict[str, Any] = {"tpf": [r.tokens_per_forward for r in rollouts], "block_size": 4}
    figure, axes = plt.subplots(figsize=(WIDTH, 2.5))
    for name, correct, colour in (("right", True, CLEAN), ("wrong", False, VIEW)):
        question = reward.Question("", "")
        data[name] = [reward.speed(reward.Graded(r, question, "", "", correct, 4)) for r in rollouts]
        axes.plot(data["tpf"], data[name], color=colour, lw=2.4, label=name)
    axes.axhline(0, color="0.5", lw=0.8)
    axes.set(xlabel="tokens per forward (TPF)", ylabel="speed reward", xlim=(1, 4), yticks=[-0.5, 0, 0.5, 1])
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", frameon=False)
    _save(figure, path)
    return data


def cost(path: Path) -> dict[str, Any]:
    """Tokens that go through the network to score one response, here and in the published layout."""
    prompt, response, b = 128, 512, 4
    data: dict[str, Any] = {"prompt": prompt, "response": response, "block_size": b, "tpf": [], "packed": []}
    for fast in range(response // b + 1):  # so many blocks in one step, the others a token per step
        steps: list[int] = []
        for block in range(response // b):
            last = steps[-1] if steps else 0
            steps += [last + 1] * b if block < fast else range(last + 1, last + 1 + b)
        trajectory = Trajectory([0] * prompt, [0] * response, steps, [0.0] * response)
        data["tpf"].append(response / len(set(steps)))
        data["packed"].append(replay(trajectory, b, weight=1.0).num_tokens)
    published = data["published"] = b * 2 * (prompt + response)

    figure, axes = plt.subplots(figsize=(WIDTH, 2.6))
    axes.axhline(published, color=VIEW, lw=2.4, label="B passes over [noisy | clean]: B 2L")
    axes.plot(data["tpf"], data["packed"], color=CLEAN, lw=2.4, label="one packed row: L + R B / TPF")
    for tpf in (1, 2, 4):
        tokens = data["packed"][int(np.argmin(np.abs(np.array(data["tpf"]) - tpf)))]
        axes.plot([tpf], [tokens], "o", color=CLEAN)
        side = "right" if tpf == 4 else "left"
        axes.text(tpf, tokens + 350, f"{published / tokens:.1f} x fewer", ha=side)
    axes.set(xlabel="tokens per forward (TPF)", ylabel="tokens", xlim=(0.9, 4.1), ylim=(0, published * 1.5))
    axes.set_title(f"L = {prompt + response}, of which R = {response} the response; B = {b}")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", frameon=False)
    _save(figure, path)
    return data


FIGURES = {
    f.__name__: f
    for f in (
        packed_row, replayed_views, sft_noise, decoding, hold_mass, advantages, surrogate, speed_reward, cost,
    )
}  # fmt: skip


def _below(columns: int) -> dict[str, Any]:
    """Where a legend goes: under the axes."""
    return {"loc": "outside lower center", "ncol": columns, "frameon": False, "handlelength": 1.2}


def _save(figure: plt.Figure, path: Path) -> None:
    """Write a PNG of 800 pixels; 256 colours are enough, and make it half as large."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=160)
    plt.close(figure)
    whole = Image.open(picture).convert("RGB")
    whole.quantize(256, dither=Image.Dither.NONE).save(path, "PNG", optimize=True)


def draw(folder: Path, names: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Draw the figures of those names (None: all) into a folder, created; what each returned, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        return {name: FIGURES[name](folder / f"{name}.png") for name in names or FIGURES}


def main() -> None:
    """Draw what the command line names."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FIGURES)}; none: all")
    parser.add_argument("--out", type=folder_name, default=Path(__file__).with_name("method"), help="folder")
    options = parser.parse_args()
    for name in options.names:
        if name not in FIGURES:
            parser.error(f"no figure {name!r}, expected some of {', '.join(FIGURES)}")
    for name in draw(options.out, options.names):
        print(options.out / f"{name}.png")


if __name__ == "__main__":
    run_script(main)
