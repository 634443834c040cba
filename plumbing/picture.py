"""Decodings as an animated picture: several rules side by side, all at the same step.

Drawn by Pillow in DejaVu Sans Mono, which matplotlib brings: nothing of the system is needed, and a
character that this font lacks is a box. A card of its own colour looks alike on light and on dark pages.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from plumbing.common import printable, writing
from plumbing.show import Answer, Cell, cells, counted

# In pixels; a README shows 830 of them, so all is twice as large as it will look.
WIDTH, MARGIN, BETWEEN = 1660, 44, 60
TOP, PANEL_TOP, LEGEND = 120, 150, 84  # heights: above the panels, above a panel's tokens, below all
HEIGHT, PAD, GAP, BLOCK_GAP = (
    50,
    7,
    4,
    10,
)  # of a token: height, room beside its text; between tokens, and more between blocks
ROWS = 8  # of tokens in a panel; of a longer answer the last ones are shown
FRAMES = 400  # at most, about; of a longer decoding several steps go by between two of them
HOLD = 5.0  # seconds of the last frame
CARD, TEXT, DIM, EMPTY, NEW = (22, 27, 34), (230, 237, 243), (145, 152, 161), (56, 63, 72), (255, 196, 61)
UNSURE, SURE = (185, 58, 58), (35, 98, 68)


@functools.cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans Mono."""
    name = "DejaVuSansMono-Bold.ttf" if bold else "DejaVuSansMono.ttf"
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts/ttf" / name), size)


def shade(probability: float | None) -> tuple[int, ...]:
    """The colour behind a known token: from unsure to sure; sure if that is not known."""
    share = 1.0 if probability is None else max(0.0, min(1.0, probability))
    return tuple(round(low + (high - low) * share) for low, high in zip(UNSURE, SURE, strict=True))


def fitted(text: str, size: int, width: float, bold: bool = False) -> str:
    """A text, cut to a width in pixels."""
    most = int(width / font(size, bold).getlength("m"))
    return text if len(text) <= most else text[: max(0, most - 1)] + "…"


def place(seen: list[Cell], width: int) -> list[tuple[int, int, int, Cell]]:
    """(row, left, right, cell) of each token; left and right in pixels.

    Rows are broken between blocks, and within one only if it is longer than a row or has a new line.
    """
    placed, row, left = [], 0, 0
    for _, group in itertools.groupby(seen, key=lambda cell: cell.block):
        block = []
        for cell in group:
            text = fitted(cell.text.replace("\n", ""), 30, width - 2 * PAD)
            block.append((round(font(30).getlength(text)) + 2 * PAD, text, cell))
        whole = sum(size for size, _, _ in block) + GAP * (len(block) - 1)
        if left and left + whole > width >= whole:
            row, left = row + 1, 0
        for size, text, cell in block:
            if left and left + size > width:
                row, left = row + 1, 0
            placed.append((row, left, left + size, cell._replace(text=text)))
            left += size + GAP
            if cell.text.endswith("\n"):
                row, left = row + 1, 0
        left += BLOCK_GAP if left and len(block) > 1 else 0
    return placed


def draw_panel(
    draw: ImageDraw.ImageDraw, caption: str, answer: Answer, step: int, left: int, width: int, rows: int
) -> None:
    """One answer after a step: its caption and counters, and below them its tokens.

    Args:
        left, width: in pixels.
        rows: of tokens, of which the last ones are shown.
    """
    # How it is decoded, and how far it is.
    taken = min(step, answer.num_steps)
    known = sum(0 < s <= taken for s in answer.steps)
    all_tokens = len(answer.steps) - answer.prompt_tokens
    draw.text((left, TOP), fitted(caption, 30, width, bold=True), TEXT, font(30, bold=True))
    count = counted(taken, "step") + " ✓" * (step > answer.num_steps)
    draw.text((left, TOP + 42), count, NEW, font(40, bold=True))
    rate = f"{known / max(taken, 1):.2f} tokens per forward"
    if left + 290 + font(26).getlength(rate) < left + width:
        draw.text((left + 290, TOP + 54), rate, DIM, font(26))
    draw.rectangle((left, TOP + 104, left + width, TOP + 111), EMPTY)
    if known:
        draw.rectangle((left, TOP + 104, left + round(width * known / all_tokens), TOP + 111), NEW)

    # Its tokens: masked, just revealed, or known, in the colour of how sure the model was.
    placed = place(cells(answer, step), width)
    first_row = max(0, placed[-1][0] - rows + 1) if placed else 0
    for row, begin, end, cell in placed:
        if row < first_row:
            continue
        y = TOP + PANEL_TOP + (row - first_row) * (HEIGHT + GAP + 4)
        fill = {"masked": EMPTY, "new": NEW, "behind": CARD}.get(cell.state) or shade(cell.probability)
        draw.rounded_rectangle((left + begin, y, left + end, y + HEIGHT), 6, fill)
        if cell.state != "masked":
            ink = {"new": CARD, "behind": DIM}.get(cell.state, TEXT)
            draw.text((left + begin + PAD, y + 6), cell.text, ink, font(30))


def draw_legend(draw: ImageDraw.ImageDraw, y: int, probabilities: bool) -> None:
    """What the colours mean, in a line."""
    x = MARGIN
    for fill, meaning in ((EMPTY, "masked"), (NEW, "just revealed")):
        draw.rounded_rectangle((x, y, x + 30, y + 30), 6, fill)
        draw.text((x + 44, y - 1), meaning, DIM, font(26))
        x += 84 + round(font(26).getlength(meaning))
    if probabilities:
        draw.text((x, y - 1), "probability  0", DIM, font(26))
        x += round(font(26).getlength("probability  0")) + 14
        for i in range(11):
            draw.rectangle((x, y, x + 20, y + 30), shade(i / 10))
            x += 20
        draw.text((x + 16, y - 1), "1", DIM, font(26))


def draw_frame(question: str, answers: dict[str, Answer], step: int) -> Image.Image:
    """The picture of all answers after a step; one that needs no more steps stays as it is."""
    panels = len(answers)
    width = (WIDTH - 2 * MARGIN - (panels - 1) * BETWEEN) // panels
    rows = 1
    for answer in answers.values():
        whole = place(cells(answer, answer.num_steps), width)
        rows = max(rows, min(ROWS, whole[-1][0] + 1 if whole else 1))
    height = TOP + PANEL_TOP + rows * (HEIGHT + GAP + 4) + LEGEND
    image = Image.new("RGB", (WIDTH, height), CARD)
    draw = ImageDraw.Draw(image)
    title = fitted(printable(" ".join(question.split())), 38, WIDTH - 2 * MARGIN)
    draw.text((MARGIN, 36), title, TEXT, font(38, bold=True))
    for i, (caption, answer) in enumerate(answers.items()):
        draw_panel(draw, caption, answer, step, MARGIN + i * (width + BETWEEN), width, rows)
    draw_legend(draw, height - 56, any(a.probabilities for a in answers.values()))
    return image


def write_gif(file: Path, question: str, answers: dict[str, Answer], pace: float) -> int:
    """Write an animated GIF of all answers being decoded side by side, until the last has ended.

    A frame for the beginning, one for each step, and a last one in which nothing is new, which stays.

    Args:
        answers: by caption.
        pace: seconds per step.

    Returns:
        The number of its frames.

    Raises:
        InputError: the file cannot be written.
    """
    # The frames. All have the colours of three of them, so what does not change costs no bytes.
    last = max(answer.num_steps for answer in answers.values()) + 1
    stride = -(-last // FRAMES)
    frames = [draw_frame(question, answers, step) for step in [*range(0, last, stride), last]]
    sample = Image.new("RGB", (WIDTH, 3 * frames[0].height))
    for i, frame in enumerate((frames[len(frames) // 4], frames[len(frames) // 2], frames[-1])):
        sample.paste(frame, (0, i * frame.height))
    palette = sample.quantize(64, Image.Quantize.MEDIANCUT)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]

    # The file. Times are in milliseconds, of which the format knows whole tens.
    seconds = max(0.02, pace)
    times = [round(100 * seconds) * 10] * (len(frames) - 1) + [round(1000 * HOLD)]
    with writing(file):
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)
    return len(frames)
