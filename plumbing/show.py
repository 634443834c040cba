"""An answer as it came about, shown: as plain lines, as a moving text in the terminal, as a GIF.

All three are made of the same lists, one item per token: text, step, block, probability (`Answer`). What is
known at a step is decided in one place, `cells`; `layout` breaks that into lines, and the rest is paint:

    step 1   3+░░            masked tokens are drawn as wide as what will stand there, so that nothing jumps;
    step 2   3+8=            blocks that have not begun are not drawn
    step 3   3+8=░░░░

Texts are what a model wrote: nothing in them moves a terminal's cursor, colours it or rings its bell.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from plumbing.common import AT_END, printable

# From less sure to surer: up to which probability, and its colour, legible on light and on dark.
UNSURE = ((0.5, "38;5;160"), (0.7, "38;5;172"), (0.9, "38;5;142"))
NEW, MASKED, BEHIND = "1;7", "38;5;244", "38;5;244"  # just revealed; not yet known; behind the end


@dataclass
class Answer:
    """An answer with the tokens of its prompt before it; the lists have one item per token of both."""

    texts: list[str]  # joined they are the text, see `token_texts`
    steps: list[int]  # at which each was revealed, counted from 1 without a gap; 0: the prompt's
    blocks: list[int]  # which are denoised one after the other; ascending
    probabilities: list[float] | None  # at the reveal, 1 for the prompt's; None: not known
    num_tokens: int  # of the answer, up to its end; those behind it were generated too
    finish_reason: str
    text: str  # of those num_tokens, without special tokens
    seconds: float  # of generation

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self.steps.count(0)

    @property
    def num_steps(self) -> int:
        """Steps of the whole answer."""
        return max(self.steps)

    @property
    def tokens_per_forward(self) -> float:
        """Tokens per step, those behind the end included."""
        return (len(self.steps) - self.prompt_tokens) / self.num_steps


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token; joined they are `tokenizer.decode(ids)`, to the letter.

    A character made of several tokens belongs to the last of them, the others have an empty text.
    """
    # Nearly always tokens mean the same alone and in a row.
    whole = tokenizer.decode(ids)
    alone = [tokenizer.decode([token]) for token in ids]
    if "".join(alone) == whole:
        return alone

    # Else each gets what the beginning of the text gains by it and keeps to the end.
    texts, end = [], 0
    for i in range(len(ids)):
        begin, so_far = end, tokenizer.decode(ids[: i + 1])
        while end < min(len(so_far), len(whole)) and so_far[end] == whole[end]:
            end += 1
        texts.append(whole[begin:end])
    return texts


def of_record(
    tokenizer: Any,
    prompt: list[int],
    record: Any,
    logprobs: list[float] | None,
    block_size: int,
    seconds: float,
) -> Answer:
    """The answer that an engine's record is.

    Args:
        record: has response_ids and the steps of these, num_tokens and finish_reason.
        logprobs: of response_ids; None: not known.
        block_size: tokens per block; the prompt's first token begins the first one.
        seconds: of generation.
    """
    response, steps = record.response_ids, [0] * len(prompt) + record.steps
    probabilities = None if logprobs is None else [1.0] * len(prompt) + list(map(math.exp, logprobs))
    return Answer(
        texts=token_texts(tokenizer, prompt) + token_texts(tokenizer, response),
        steps=steps,
        blocks=[i // block_size for i in range(len(steps))],
        probabilities=probabilities,
        num_tokens=record.num_tokens,
        finish_reason=record.finish_reason,
        text=tokenizer.decode(response[: record.num_tokens], skip_special_tokens=True),
        seconds=seconds,
    )


# ------------------------------------------------------------------------- the state at a step


class Cell(NamedTuple):
    """A token as it is drawn, or the tokens of one character together."""

    text: str  # printable, except that a line may end in it
    state: str  # masked, new (just revealed), known, or behind (the end)
    probability: float | None
    block: int


def cells(answer: Answer, step: int) -> list[Cell]:
    """What is to be seen of an answer after a step, without the prompt.

    Args:
        step: 0: before the first one; more than there are: nothing is new any more.
    """
    first = answer.prompt_tokens
    last_block = answer.blocks[first]
    if step > 0:
        last_block = answer.blocks[answer.steps.index(min(step, answer.num_steps))]
    found, revealed, probability = [], 0, 1.0
    for i in range(first, len(answer.steps)):
        if answer.blocks[i] > last_block:
            break
        revealed = max(revealed, answer.steps[i])
        if answer.probabilities:
            probability = min(probability, answer.probabilities[i])
        if not answer.texts[i]:  # a part of the next one's character
            continue
        state = "behind" if i >= first + answer.num_tokens else "known"
        if revealed >= step:
            state = "new" if revealed == step else "masked"
        text = "↵\n".join(map(printable, answer.texts[i].split("\n")))
        found.append(Cell(text, state, probability if answer.probabilities else None, answer.blocks[i]))
        revealed, probability = 0, 1.0
    return found


def columns(character: str) -> int:
    """Columns of a terminal that a printable character takes, or fewer: accents are counted as one."""
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def layout(seen: list[Cell], width: int, mask: str = "░") -> list[list[tuple[str, Cell]]]:
    """Lines of (text, its cell), none wider than `width` columns, except where a character alone is.

    A token that fits in a line is not broken.
    """
    lines, used = [[]], 0
    for cell in seen:
        whole = sum(map(columns, cell.text.replace("\n", "")))
        if used and used + whole > width >= whole:
            lines.append([])
            used = 0
        piece = ""
        for character in cell.text:
            takes = 0 if character == "\n" else columns(character)
            if character == "\n" or (used and used + takes > width):
                lines[-1].append((piece, cell))
                lines.append([])
                piece, used = "", 0
            if takes:
                piece += mask * takes if cell.state == "masked" else character
                used += takes
        lines[-1].append((piece, cell))
    return lines


def figures(answer: Answer) -> str:
    """What an answer cost, in a line."""
    count = len(answer.steps) - answer.prompt_tokens
    return (
        f"{counted(count, 'token')} in {counted(answer.num_steps, 'step')}, "
        f"{answer.tokens_per_forward:.2f} tokens per forward, "
        f"{count / max(answer.seconds, 1e-9):.0f} tokens/s"
    )


def counted(number: int, name: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number} {name}{'s' * (number != 1)}"


def counters(answer: Answer, step: int) -> str:
    """Where the decoding is after a step, in a line."""
    first = answer.prompt_tokens
    step = min(step, answer.num_steps)
    known = sum(0 < s <= step for s in answer.steps)
    block = answer.blocks[answer.steps.index(step) if step else first] - answer.blocks[first] + 1
    blocks = answer.blocks[-1] - answer.blocks[first] + 1
    return (
        f"step {step}/{answer.num_steps}  block {block}/{blocks}  +{answer.steps.count(step) if step else 0}"
        f"  {known / max(step, 1):.2f} tokens per forward"
    )


# ----------------------------------------------------------------------------- plain lines


def plain_lines(answer: Answer) -> Iterator[str]:
    """For a pipe or a file: at each step the block in which something was revealed, then the step map."""
    for step in range(1, answer.num_steps + 1):
        block, seen = answer.blocks[answer.steps.index(step)], []
        for i in range(answer.blocks.index(block), len(answer.steps)):
            if answer.blocks[i] > block:
                break
            seen.append(answer.texts[i] if answer.steps[i] <= step else "_")
        yield f"step {step:3d}  block {block:3d}  {' '.join(map(repr, seen))}"
    first = answer.prompt_tokens
    yield f"\n{''.join(answer.texts[first : first + answer.num_tokens])!r}"
    yield f"finish: {answer.finish_reason}, {answer.tokens_per_forward:.2f} tokens per forward"
    yield f"step map: {answer.steps[first:]}"


# ---------------------------------------------------------------------- moving, in a terminal


def moves() -> bool:
    """Whether standard output is a terminal on which something can move."""
    return sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def colour(cell: Cell) -> str:
    """Parameters of the terminal's sequence for the way in which a cell is drawn; empty: as it is."""
    if cell.state in ("new", "masked", "behind"):
        return {"new": NEW, "masked": MASKED, "behind": BEHIND}[cell.state]
    for below, code in UNSURE:
        if cell.probability is not None and cell.probability < below:
            return code
    return ""


def ansi_lines(answer: Answer, step: int, width: int, coloured: bool, mask: str = "░") -> list[str]:
    """The lines of an answer after a step, as a terminal is to print them."""
    lines = []
    for line in layout(cells(answer, step), width, mask):
        text = ""
        for piece, cell in line:
            code = colour(cell) if coloured and piece else ""
            text += f"\033[{code}m{piece}\033[m" if code else piece
        lines.append(text)
    return lines


def play(answer: Answer, pace: float) -> None:
    """Play a decoding in the terminal, in place; at the end all of the answer stands there.

    Only as many lines move as the terminal has; of a longer answer these are the last ones. Each frame is
    one write that draws over the one before, so nothing flickers, and a line that a terminal takes for
    wider than we do is cut off at the edge: the cursor is always where we think it is.

    Args:
        pace: seconds per step.
    """
    coloured = not os.environ.get("NO_COLOR")
    mask = "░" if "utf" in (sys.stdout.encoding or "").lower() else "_"
    drawn, before = 0, None
    AT_END.append(leave_terminal)  # if a signal ends the process
    for step in range(answer.num_steps + 2):  # the last frame: nothing is new any more
        # The frame: the last lines of the answer and the counters; at the end the whole answer.
        ended = step > answer.num_steps
        size = shutil.get_terminal_size()
        width = max(1, size.columns - 1)
        lines = ansi_lines(answer, step, width, coloured, mask)
        if not ended:
            lines = lines[-max(1, size.lines - 2) :]
        lines.append((figures(answer) if ended else counters(answer, step))[:width])
        if size.lines < 2 and not ended:
            lines = lines[:1]

        # Over the one before. A terminal of another size has broken its lines anew, so start on a clean one.
        up = f"\r\033[{drawn - 1}A" if drawn > 1 else "\r"
        if before not in (None, size):
            up = "\033[H\033[2J"
        frame = up + "".join(f"{line}\033[K\n" for line in lines)[:-1]
        sys.stdout.write(f"\033[?2026h\033[?7l{frame}\033[?7h\033[?2026l" + "\n" * ended)
        sys.stdout.flush()
        drawn, before = len(lines), size
        if not ended:
            time.sleep(pace)
    AT_END.remove(leave_terminal)


def leave_terminal() -> None:
    """Leave a frame that has been cut off: a new line, colours and the breaking of lines as usual."""
    sys.stdout.write("\033[m\033[?7h\033[?2026l\n")
    sys.stdout.flush()


def show(answer: Answer, pace: float | None = None) -> None:
    """Play a decoding in a terminal; print it as plain lines elsewhere.

    Args:
        pace: seconds per step; None: a fifth of a second, less if there are many.
    """
    if moves():
        play(answer, min(0.2, 15 / answer.num_steps) if pace is None else pace)
        return
    for line in plain_lines(answer):
        print(line)
    sys.stdout.flush()
