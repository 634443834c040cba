"""plumbing/show.py and plumbing/picture.py: an answer as it came about, in lines, in a terminal, in a GIF.

Oracles: the loop that rollout.py printed trajectories with, tokenizer.decode, a terminal that draws what
is written to it (terminal.py), and Pillow, which reads the pictures back.
"""

import json
import math
import os
import random
import re
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from conftest import random_steps
from PIL import Image, ImageChops
from terminal import Program, Screen

from plumbing import picture, show
from plumbing.checkpoint import tiny_tokenizer
from plumbing.common import ROOT, InputError
from plumbing.show import (
    Answer,
    ansi_lines,
    cells,
    colour,
    counters,
    layout,
    of_record,
    plain_lines,
    token_texts,
)

HOSTILE = [
    "\033[2J", "\033]0;title\a", "a\rb", "\b\b", "\x9b31m", "\u202eright", "世界", "\uff21", "é", "e\u0301",
    "☎\ufe0f", "\U0001f469\u200d\U0001f467", "\n", "line\nline\n\n", "\t", "\x00", " " * 9, "=" * 50,
    "\u200b", "\u2028", "\ud7ff", "ﷺ", "`rm`", "%s {x}",
]  # fmt: skip


def an_answer(texts, steps, prompt=0, block_size=4, probabilities=None, num_tokens=None) -> Answer:
    """An answer of texts, of which the first `prompt` are known from the start."""
    shown = len(texts) - prompt if num_tokens is None else num_tokens
    blocks = [i // block_size for i in range(len(texts))]
    text = "".join(texts[prompt : prompt + shown])
    return Answer(texts, [0] * prompt + steps, blocks, probabilities, shown, "stop", text, 0.5)


def random_answer(rng: random.Random, texts: list[str], prompt: int, blocks: int) -> Answer:
    tokens = (prompt // 4 + blocks) * 4
    drawn = [rng.choice(texts) for _ in range(tokens)]
    steps = random_steps(rng, prompt, tokens - prompt, 4)
    probabilities = [rng.random() for _ in range(tokens)]
    return an_answer(drawn, steps, prompt, probabilities=probabilities, num_tokens=tokens - prompt - 2)


# ----------------------------------------------------------------------------- texts of tokens


@pytest.mark.parametrize("text", ["3+8=11", "héllo", "世界 👩‍👧!", "a\ufffdb", "", "é"])
def test_the_texts_of_tokens_joined_are_the_text(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == text


def test_a_character_belongs_to_its_last_token():
    tokenizer = tiny_tokenizer()
    assert token_texts(tokenizer, tokenizer("aé€b")["input_ids"]) == ["a", "", "é", "", "", "€", "b"]


def test_texts_of_random_bytes_joined_are_what_the_tokenizer_says():
    tokenizer, rng = tiny_tokenizer(), random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(12))]
        assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids)


def test_texts_of_a_tokenizer_whose_tokens_mean_something_else_alone():
    """One as Llama's: a word's token begins with a blank, which goes at the beginning of a text."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"▁the": 0, "▁end": 1, ".": 2}, unk_token="."))
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert tokenizer.decode([0, 1, 2]) == "the end." and tokenizer.decode([1]) == "end"
    assert token_texts(tokenizer, [0, 1, 2]) == ["the", " end", "."]


# ----------------------------------------------------------------------------- the state at a step


def test_the_state_of_every_token_at_every_step():
    rng = random.Random(1)
    for _ in range(50):
        prompt = rng.randrange(1, 9)
        answer = random_answer(rng, ["a", "b"], prompt, rng.randrange(1, 5))
        for step in range(answer.num_steps + 2):
            begun = [b for b, s in zip(answer.blocks, answer.steps, strict=True) if 0 < s <= max(1, step)]
            expected = []
            for i in range(prompt, len(answer.steps)):
                revealed = answer.steps[i]
                state = "masked" if revealed > step else "new" if revealed == step else "known"
                if state == "known" and i - prompt >= answer.num_tokens:
                    state = "behind"
                if answer.blocks[i] <= max(begun):
                    expected.append((answer.texts[i], state, answer.probabilities[i]))
            assert [cell[:3] for cell in cells(answer, step)] == expected


def test_a_character_of_several_tokens_is_known_when_all_of_them_are():
    answer = an_answer(["a", "", "é", "b"], [1, 3, 1, 2], probabilities=[1.0, 0.2, 0.9, 1.0])
    states = [[(cell.text, cell.state) for cell in cells(answer, step)] for step in (1, 2, 3)]
    assert states[0] == [("a", "new"), ("é", "masked"), ("b", "masked")]
    assert states[1] == [("a", "known"), ("é", "masked"), ("b", "new")]
    assert states[2] == [("a", "known"), ("é", "new"), ("b", "known")]
    assert cells(answer, 3)[1].probability == 0.2


def test_counters_count():
    answer = an_answer(["p", "q", *"abcdef"], [1, 1, 4, 2, 3, 2], prompt=2)
    assert counters(answer, 0) == "step 0/4  block 1/2  +0  0.00 tokens per forward"
    assert counters(answer, 2) == "step 2/4  block 2/2  +2  2.00 tokens per forward"
    assert counters(answer, 5) == "step 4/4  block 2/2  +1  1.50 tokens per forward"
    assert show.figures(answer) == "6 tokens in 4 steps, 1.50 tokens per forward, 12 tokens/s"


# ----------------------------------------------------------------------------------- plain lines


def test_the_plain_form():
    answer = an_answer(
        ["Q", "?", "1", "\033", "<end>", "é\n"], [1, 3, 2, 2], prompt=2, block_size=2, num_tokens=3
    )
    answer.steps = [0, 0, 1, 2, 4, 3]
    assert list(plain_lines(answer)) == [
        "step   1  block   1  '1' '_'",
        "step   2  block   1  '1' '\\x1b'",
        "step   3  block   2  '_' 'é\\n'",
        "step   4  block   2  '<end>' 'é\\n'",
        "\n'1\\x1b<end>'",
        "finish: stop, 1.00 tokens per forward",
        "step map: [1, 2, 4, 3]",
    ]


def test_the_plain_form_is_that_of_before():
    """The loop that rollout.py had, over tokens that are whole characters."""
    tokenizer, rng = tiny_tokenizer(), random.Random(2)
    for _ in range(20):
        prompt, b = [rng.randrange(33, 120) for _ in range(rng.randrange(1, 10))], 4
        size = (len(prompt) // b + 3) * b - len(prompt)
        response, steps = (
            [rng.randrange(33, 120) for _ in range(size)],
            random_steps(rng, len(prompt), size, b),
        )
        record = SimpleNamespace(
            response_ids=response, steps=steps, num_tokens=size - 1, finish_reason="length"
        )
        answer = of_record(tokenizer, prompt, record, [-1.0] * size, b, seconds=1.0)
        ids, all_steps, expected = prompt + response, [0] * len(prompt) + steps, []
        for step in range(1, max(steps) + 1):
            block = all_steps.index(step) // b
            seen = []
            for i in range(block * b, block * b + b):
                seen.append(tokenizer.decode(ids[i]) if all_steps[i] <= step else "_")
            expected.append(f"step {step:3d}  block {block:3d}  {' '.join(map(repr, seen))}")
        expected.append(f"\n{tokenizer.decode(response[:-1])!r}")
        expected.append(f"finish: length, {size / max(steps):.2f} tokens per forward")
        expected.append(f"step map: {steps}")
        assert list(plain_lines(answer)) == expected
        assert answer.probabilities == [1.0] * len(prompt) + [math.exp(-1)] * size


# ---------------------------------------------------------------------------------------- lines


@pytest.mark.parametrize("width", [2, 3, 7, 40])
def test_lines_are_no_wider_than_asked_and_lose_nothing(width):
    rng, screen = random.Random(3), Screen(200, 2)
    for _ in range(50):
        answer = random_answer(rng, HOSTILE + list("abc"), 2, 5)
        end = answer.num_steps + 1
        lines = layout(cells(answer, end), width)
        for line in lines:
            assert sum(screen.width(c) for text, _ in line for c in text) <= width
        joined = "".join(text for line in lines for text, _ in line)
        assert joined == "".join(cell.text for cell in cells(answer, end)).replace("\n", "")


def test_what_is_masked_takes_the_room_of_what_will_be_there():
    rng, screen = random.Random(4), Screen(200, 2)
    for _ in range(50):
        answer = random_answer(rng, ["\n", "a\nb", "世界", "word", "=" * 20, " "], 0, 1)
        shapes = set()
        for step in range(answer.num_steps + 2):
            lines = layout(cells(answer, step), 10)
            shapes.add(tuple(sum(screen.width(c) for t, _ in line for c in t) for line in lines))
        assert len(shapes) == 1
        assert "".join(t for line in layout(cells(answer, 0), 10) for t, _ in line).strip("░") == ""


def test_a_token_is_broken_only_if_no_line_holds_it():
    lines = layout(cells(an_answer(["aaa", "bbb", "c", "d" * 12], [1, 1, 1, 1]), 2), 5)
    assert [[text for text, _ in line if text] for line in lines] == [
        ["aaa"],
        ["bbb", "c", "d"],
        ["ddddd"],
        ["ddddd"],
        ["d"],
    ]


def test_the_less_sure_the_other_the_colour():
    answer = an_answer(list("abcdef"), [1] * 6, block_size=8, probabilities=[0.1, 0.6, 0.8, 0.95, 1.0, 1.0])
    answer.num_tokens = 5
    codes = [colour(cell) for cell in cells(answer, 2)]
    assert len(set(codes[:4])) == 4 and codes[3] == codes[4] == "" and codes[5] == show.BEHIND
    assert {colour(cell) for cell in cells(answer, 1)} == {show.NEW}
    assert {colour(cell) for cell in cells(answer, 0)} == {show.MASKED}
    answer.probabilities = None
    assert [colour(cell) for cell in cells(answer, 2)][:5] == [""] * 5
    assert "\033" not in "".join(ansi_lines(answer, 1, 80, coloured=False))


# ------------------------------------------------------------------------------ in a terminal

PLAY = """
import json, sys
sys.path.insert(0, {root!r})
from plumbing.common import AT_END
from plumbing.show import Answer, show
show(Answer(**json.load(open({file!r}))), {pace})
assert not AT_END
print("after")
"""


def program(answer: Answer, tmp_path, columns=80, rows=24, pace=0.0, **environment) -> Program:
    """A process that shows the answer on a terminal of that size."""
    file = tmp_path / "answer.json"
    file.write_text(json.dumps(asdict(answer)))
    code = PLAY.format(root=str(ROOT), file=str(file), pace=pace)
    base = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    env = base | {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"} | environment
    return Program([sys.executable, "-c", code], columns, rows, env=env)


def shown(answer: Answer, tmp_path, columns=80, rows=24, **environment) -> tuple[str, Screen]:
    """What a process wrote that showed the answer, and the screen afterwards."""
    running = program(answer, tmp_path, columns, rows, **environment)
    try:
        assert running.end() == 0, running.output
    finally:
        running.close()
    screen = Screen(columns, rows)
    screen.feed(running.output)
    return running.output, screen


def frames_of(output: str) -> list[str]:
    """The writes between the marks of synchronized output."""
    return re.findall(r"\033\[\?2026h(.*?)\033\[\?2026l", output, re.DOTALL)


def expected_lines(answer: Answer, columns: int) -> list[str]:
    """What has to stand there in the end."""
    lines = ansi_lines(answer, answer.num_steps + 1, max(1, columns - 1), coloured=False)
    return [line.rstrip() for line in [*lines, show.figures(answer)[: max(1, columns - 1)]]]


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (200, 50), (20, 5), (7, 3), (40, 2)])
def test_a_hostile_answer_in_terminals_of_many_sizes(tmp_path, columns, rows):
    rng = random.Random(columns)
    answer = random_answer(rng, HOSTILE + list("abcdefghij"), 3, 12)
    output, screen = shown(answer, tmp_path, columns, rows)
    assert len(frames_of(output)) == answer.num_steps + 2
    assert screen.too_high == 0, "the cursor was sent above the frame"
    assert screen.wraps, "lines are broken as usual again"
    # Nothing of a frame is left behind: the screen and what scrolled off are the answer, once.
    expected = [*expected_lines(answer, columns), "after"]
    assert [drawn(line) for line in screen.text.split("\n")] == [drawn(line) for line in expected]


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (2, 1), (1, 9)])
def test_a_terminal_of_hardly_any_room_is_no_reason_to_fail(tmp_path, columns, rows):
    _, screen = shown(random_answer(random.Random(8), HOSTILE, 3, 3), tmp_path, columns, rows)
    assert screen.too_high == 0 and screen.wraps


def drawn(line: str) -> str:
    """A line without the accents that stand on other letters: the screen does not keep them."""
    return "".join(c for c in line if Screen(9, 9).width(c)).rstrip()


def test_each_frame_shows_the_state_at_its_step(tmp_path):
    answer = an_answer(
        ["Q", "?", *"3+8=11"], [2, 1, 5, 3, 4, 3], prompt=2, probabilities=[1.0] * 6 + [0.3, 1.0]
    )
    output, _ = shown(answer, tmp_path)
    screen, seen = Screen(80, 24), []
    for frame in frames_of(output):
        screen.feed(frame)
        seen.append(screen.text.split("\n"))
    texts = [frame[0] for frame in seen]
    assert texts == ["░░", "░+", "3+", "3+░=░1", "3+░=11", "3+8=11", "3+8=11"]
    assert seen[3][1] == "step 3/5  block 2/2  +2  1.33 tokens per forward"
    assert [len(frame) for frame in seen] == [2] * 7
    assert show.NEW in screen.colours and "38;5;160" in screen.colours
    assert frames_of(output)[-1].count("38;5;160") == 1 and show.NEW + "m" not in frames_of(output)[-1]


def test_of_a_long_answer_the_tail_moves_and_all_of_it_stays(tmp_path):
    answer = an_answer([f"line {i}\n" for i in range(60)], list(range(1, 61)))
    output, screen = shown(answer, tmp_path, 40, 10)
    assert all(frame.count("\n") < 10 for frame in frames_of(output)[:-1])
    assert screen.text.split("\n") == [f"line {i}↵" for i in range(60)] + [
        "",
        *expected_lines(answer, 40)[-1:],
        "after",
    ]
    assert screen.too_high == 0 and screen.wrapped == 0


def test_a_terminal_that_draws_some_letters_wider_keeps_its_lines(tmp_path):
    answer = random_answer(random.Random(5), ["↵", "░", "°", "α", "word "], 0, 30)
    output, _ = shown(answer, tmp_path, 30, 20)
    screen = Screen(30, 20, ambiguous=2)
    screen.feed(output)
    assert screen.wrapped == 0 and screen.too_high == 0
    assert len(screen.text.split("\n")) == len(expected_lines(answer, 30)) + 1


def test_a_terminal_that_changes_its_size_is_drawn_anew(tmp_path):
    answer = an_answer([f"word{i} " for i in range(40)], list(range(1, 41)))
    running = program(answer, tmp_path, 60, 12, pace=0.05)
    try:
        running.until("step 5/40")
        running.resize(24, 9)
        cleared = running.until("\033[H\033[2J") - len("\033[H\033[2J")
        assert running.end() == 0
        screen = Screen(24, 9)
        screen.feed(running.output[cleared:])
        assert screen.text.split("\n") == [line for line in expected_lines(answer, 24)] + ["after"]
        assert screen.too_high == 0
    finally:
        running.close()


def test_no_color_means_no_colours(tmp_path):
    answer = an_answer(list("abcd"), [1, 2, 2, 3], probabilities=[0.1] * 4)
    coloured, _ = shown(answer, tmp_path)
    plain, screen = shown(answer, tmp_path, NO_COLOR="1")
    assert re.search(r"\033\[[\d;]*m", coloured) and not re.search(r"\033\[[\d;]*m", plain)
    assert len(frames_of(plain)) == 5 and screen.text.startswith("abcd\n")
    empty, _ = shown(answer, tmp_path, NO_COLOR="")
    assert empty == coloured, "NO_COLOR counts if it is not empty"


@pytest.mark.parametrize("terminal", ["dumb", ""])
def test_a_terminal_that_cannot_move_gets_plain_lines(tmp_path, terminal):
    answer = an_answer(list("abcd"), [1, 2, 2, 3])
    output, _ = shown(answer, tmp_path, TERM=terminal)
    assert output.replace("\r\n", "\n") == "\n".join([*plain_lines(answer), "after\n"])


def test_a_terminal_without_unicode_gets_other_masks(tmp_path):
    output, _ = shown(an_answer(list("abcd"), [1, 2, 2, 3]), tmp_path, PYTHONIOENCODING="latin-1")
    assert "_" in frames_of(output)[0] and "░" not in output


def test_ctrl_c_leaves_a_terminal_that_works(tmp_path):
    answer = an_answer(list("abcd") * 50, list(range(1, 201)))
    file = tmp_path / "answer.json"
    file.write_text(json.dumps(asdict(answer)))
    code = PLAY.format(root=str(ROOT), file=str(file), pace=0.05).replace(
        "show(Answer", "from plumbing.common import end_on_signals; end_on_signals(); show(Answer"
    )
    running = Program([sys.executable, "-c", code], env=os.environ | {"TERM": "xterm"})
    try:
        running.until("step 3/200")
        running.send("\x03")
        assert running.end() == 130
        screen = Screen(80, 24)
        screen.feed(running.output.replace("^C", ""))
        assert screen.wraps and screen.text.split("\n")[-1] == "interrupted (SIGINT)"
    finally:
        running.close()


def test_in_a_pipe_there_is_no_sequence_at_all(tmp_path):
    answer = random_answer(random.Random(6), HOSTILE, 2, 4)
    file = tmp_path / "answer.json"
    file.write_text(json.dumps(asdict(answer)))
    code = PLAY.format(root=str(ROOT), file=str(file), pace=9)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        timeout=60,
    )
    printed = done.stdout.decode()
    assert printed == "\n".join([*plain_lines(answer), "after\n"])
    assert all(c.isprintable() or c == "\n" for c in printed)


# ---------------------------------------------------------------------------------------- GIF


def sums(step_map: list[int], **changes) -> Answer:
    return an_answer(["Q", "?", *"3+8=11 11+5=16"[: len(step_map)]], step_map, prompt=2, **changes)


def read_back(file) -> list[tuple[Image.Image, int]]:
    """(frame, milliseconds) of a picture."""
    found = []
    with Image.open(file) as opened:
        for i in range(opened.n_frames):
            opened.seek(i)
            found.append((opened.convert("RGB"), opened.info["duration"]))
    return found


def test_a_gif_has_a_frame_per_step_and_goes_on_to_the_longest(tmp_path):
    slow, fast = sums([1, 2, 3, 6, 5, 4]), sums([1, 1, 3, 2, 2, 2])
    file = tmp_path / "x.gif"
    count = picture.write_gif(file, "3+8?", {"static": slow, "dynamic": fast}, 0.13)
    frames = read_back(file)
    assert count == len(frames) == max(slow.steps) + 2, "the beginning, each step, the end"
    assert [time for _, time in frames[:-1]] == [130] * 7 and frames[-1][1] >= 3000
    with Image.open(file) as opened:
        assert opened.info["loop"] == 0 and opened.width == 1660 and opened.is_animated
    # Once the fast one has ended its half stays as it is, while the other goes on.
    halves = [(f.crop((0, 0, 830, f.height)), f.crop((830, 0, 1660, f.height))) for f, _ in frames]
    lefts, rights = [half.tobytes() for half, _ in halves], [half.tobytes() for _, half in halves]
    assert len(set(lefts)) == 8 and len(set(rights)) == 5 and len(set(rights[4:])) == 1


def test_the_colours_of_a_gif_say_what_is_known(tmp_path):
    """At each step, at the left edge of each token's place."""
    answer = sums([2, 1, 5, 3, 4, 3], probabilities=[1.0] * 4 + [0.0, 1.0, 0.5, 1.0])
    file = tmp_path / "x.gif"
    picture.write_gif(file, "3+8?", {"dynamic": answer}, 0.1)
    places = picture.place(cells(answer, 99), 1660 - 2 * picture.MARGIN)
    assert [row for row, *_ in places] == [0] * 6
    for step, (frame, _) in enumerate(read_back(file)):
        for i, (_, left, _, _) in enumerate(places):
            at = picture.MARGIN + left + 3, picture.TOP + picture.PANEL_TOP + picture.HEIGHT // 2
            revealed, found = answer.steps[2 + i], frame.getpixel(at)
            block = 1 if i < 2 else 3  # its first step
            expected = picture.EMPTY if revealed > step else picture.shade(answer.probabilities[2 + i])
            expected = picture.NEW if revealed == step else expected
            expected = picture.CARD if step < block and i >= 2 else expected
            assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 24, (step, i)


def test_rows_of_a_gif_are_broken_between_blocks():
    assert picture.shade(0.0) == picture.UNSURE and picture.shade(1.0) == picture.shade(None) == picture.SURE
    for width in range(160, 400, 20):
        rows: dict[int, set[int]] = {}
        for row, _, _, cell in picture.place(cells(sums(list(range(1, 15))), 99), width):
            rows.setdefault(cell.block, set()).add(row)
        assert all(len(found) == 1 for found in rows.values()), width


def test_a_hostile_or_long_answer_stays_inside_the_picture(tmp_path):
    rng = random.Random(7)
    answer = random_answer(rng, HOSTILE + ["word ", "x" * 500], 1, 40)
    other = random_answer(rng, ["a"], 1, 40)
    for width in (100, 756):
        for step in (1, answer.num_steps + 1):
            places = picture.place(cells(answer, step), width)
            assert all(0 <= left < right <= width for _, left, right, _ in places)
            rows = [row for row, *_ in places]
            assert rows == sorted(rows)
    image = picture.draw_frame("\033[2J" + "q" * 300, {"x" * 200: answer, "b": other}, answer.num_steps + 1)
    assert image.width == 1660 and image.height < 900
    margin = image.crop((1660 - picture.MARGIN + 4, 0, 1660, image.height))
    assert margin.getcolors() == [(margin.width * margin.height, picture.CARD)]


def test_a_very_long_decoding_skips_steps_and_ends_with_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(picture, "FRAMES", 5)
    answer = sums(list(range(1, 15)))
    count = picture.write_gif(tmp_path / "x.gif", "q", {"a": answer}, 0.1)
    frames = read_back(tmp_path / "x.gif")
    assert count == len(frames) == 6
    last = picture.draw_frame("q", {"a": answer}, 15)
    difference = ImageChops.difference(frames[-1][0].resize((50, 20)), last.resize((50, 20)))
    assert max(high for _, high in difference.getextrema()) < 24


def test_a_picture_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere/x.gif: cannot write it"):
        picture.write_gif(tmp_path / "nowhere" / "x.gif", "q", {"a": sums([1, 1])}, 0.1)
