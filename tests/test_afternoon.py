"""docs/afternoon.md: its commands print what it says, and every exercise's change has the effect it says.

Commands, outputs, changes and checks are read out of the page. What a lesson prints is compared with the
page, and its numbers are computed once more here in plain Python.
"""

import functools
import math
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest

from model import load
from plumbing.checkpoint import encode_prompt, load_tokenizer, stop_ids
from rollout import Decoding, TorchEngine

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/afternoon.md").read_text(encoding="utf-8")
RELATIVE = {4: 0.01}  # lessons whose numbers may differ from the page's by so much; else to the digit
TRAINED = 2  # the lesson in which a model speaks that was trained just now: no number of it is known


@dataclass
class Lesson:
    """A section of the page."""

    number: int
    command: str
    output: str  # of the command
    change: str  # of the exercise, as a diff without line numbers
    check: list[str]  # lines that are printed after it


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block."""
    return re.findall(r"```(\w+)\n(.*?)\n```", text, flags=re.DOTALL)


def lessons() -> list[Lesson]:
    found = []
    for section in re.split(r"^## (?=\d)", PAGE, flags=re.MULTILINE)[1:]:
        kinds, (command, output, change, check) = zip(*blocks(section), strict=True)
        assert kinds == ("sh", "text", "diff", "text"), section[:40]
        found.append(Lesson(int(section[0]), command, output, change, check.splitlines()))
    return found


LESSONS = lessons()
each_lesson = pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: str(lesson.number))


@pytest.fixture(scope="module")
def course(tmp_path_factory, zygote) -> Path:
    """A copy of what the course needs, in which the page's first commands were run."""
    folder = tmp_path_factory.mktemp("afternoon") / "clone"
    for name in ("plumbing", "data", "docs/lessons"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=lambda path, names: {"__pycache__", "hub", "generated"}
        )
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    (kind, commands), *_ = blocks(PAGE)
    assert kind == "sh"
    for command in commands.splitlines():
        run(zygote, folder, command)
    return folder


def run(zygote, folder: Path, command: str) -> str:
    """What a command of the page prints."""
    python, *arguments = shlex.split(command)
    assert python == "python"
    done = zygote.run([sys.executable, *arguments], cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def printed(course, zygote):
    """printed(number): what the command of that lesson prints. Each runs once."""
    return functools.cache(lambda number: run(zygote, course, LESSONS[number - 1].command).rstrip("\n"))


@pytest.fixture(scope="module")
def printed_after(course, zygote, tmp_path_factory):
    """printed_after(number): the same after the change of its exercise."""

    @functools.cache
    def output(number: int) -> str:
        lesson, folder = LESSONS[number - 1], tmp_path_factory.mktemp("exercise") / "clone"
        shutil.copytree(course, folder, ignore=lambda path, names: {"runs", "__pycache__"})
        (folder / "runs").symlink_to(course / "runs")
        header, *lines = lesson.change.splitlines()
        file = folder / header.removeprefix("--- ")
        text = file.read_text()
        for old, new in zip(lines[::2], lines[1::2], strict=True):
            assert (old[0], new[0]) == ("-", "+")
            assert text.count(old[1:] + "\n") == 1, f"{header} has no such line, or several: {old[1:]}"
            text = text.replace(old[1:] + "\n", new[1:] + "\n")
        file.write_text(text)
        return run(zygote, folder, lesson.command)

    return output


NUMBER = r"-?\d+\.\d+"


def same(found: str, said: str, relative: float) -> bool:
    """Are the texts the same, and their decimal numbers so close?"""
    if not relative:
        return found == said
    if re.sub(NUMBER, "#", found) != re.sub(NUMBER, "#", said):
        return False
    pairs = zip(re.findall(NUMBER, found), re.findall(NUMBER, said), strict=True)
    return all(math.isclose(float(a), float(b), rel_tol=relative, abs_tol=0.0015) for a, b in pairs)


def test_there_are_eight_lessons():
    assert [lesson.number for lesson in LESSONS] == list(range(1, 9))
    assert len(list((ROOT / "docs/lessons").glob("*.py"))) == 8


@each_lesson
def test_a_command_prints_what_the_page_shows(lesson, printed):
    if lesson.number == TRAINED:
        return  # see test_decoding_follows_the_rule, which reads the page's output too
    assert same(printed(lesson.number), lesson.output, RELATIVE.get(lesson.number, 0))


@each_lesson
def test_an_exercise_has_the_effect_that_the_page_says(lesson, printed_after, printed):
    after = printed_after(lesson.number).splitlines()
    for line in lesson.check:
        if lesson.number == TRAINED:
            assert any(found.endswith(line) for found in after), after
            continue
        relative = RELATIVE.get(lesson.number, 0)
        assert any(same(found, line, relative) for found in after), f"{line!r} not in {after}"
        assert not any(same(found, line, relative) for found in printed(lesson.number).splitlines())


def test_headings_that_the_page_links_to_are_there_and_pictures_too():
    headings = re.findall(r"^## (.*)", PAGE, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
    links = re.findall(r"\]\(#([^)]+)\)", PAGE)
    assert len(links) >= 9 and set(links) <= anchors
    listed = subprocess.run(["git", "ls-files", "docs"], cwd=ROOT, capture_output=True, text=True, check=True)
    pictures = re.findall(r'<img src="([^"]+)"', PAGE)
    assert pictures and {f"docs/{name}" for name in pictures} <= set(listed.stdout.splitlines())


# ------------------------------------------------------------- the numbers, in plain Python


def test_masks(printed):
    """Six clean tokens in blocks of 2, and a view of the last block."""
    rows = [line.split("  block")[0].split()[1:] for line in printed(1).splitlines()[1:9]]
    for i, row in enumerate(rows):
        for j, mark in enumerate(row):
            block, other = (i if i < 6 else i - 2) // 2, (j if j < 6 else j - 2) // 2
            clean_sees = i < 6 and j < 6 and other <= block
            view_sees = i >= 6 and (other < block or j >= 6)
            assert mark == ("#" if clean_sees or view_sees else "."), (i, j)


@pytest.mark.parametrize("source", ["page", "now"])
def test_decoding_follows_the_rule(source, course, printed):
    """What has a star has reached the threshold, or is the most confident; TPF is tokens by steps.

    And the engine decodes the same as the lesson's own loop.
    """
    output = printed(2) if source == "now" else LESSONS[1].output
    *lines, _, text, last = output.splitlines()
    known, steps = {}, {}  # by position
    for number, line in enumerate(lines, start=1):
        step, block, shown = re.fullmatch(r"step +(\d+)  block (\d+) (.*)", line).groups()
        assert int(step) == number
        cells = re.findall(r"('(?:\\.|[^'])*'|<\w+>) (known|\d\.\d+)(\*?)", shown)
        assert len(cells) == 4
        left = {}
        for j, (token, confidence, star) in enumerate(cells):
            position = 4 * int(block) + j
            assert (position in known) == (confidence == "known"), "known is what a step before revealed"
            if confidence == "known":
                assert token == known[position] and not star
            else:
                left[position] = float(confidence)
            if star:
                known[position], steps[position] = token, number
        stars = {position for position in left if position in known}
        sure = {position for position, c in left.items() if c > 0.9}
        reached = {position for position, c in left.items() if c >= 0.9}
        if not (sure <= stars <= reached and stars):  # then none reached it: one, as confident as any
            assert not sure and len(stars) == 1
            assert left[min(stars)] == max(left.values())
    tokens, count, tpf = re.fullmatch(r"(\d+) tokens in (\d+) steps: (.*) tokens per forward", last).groups()
    assert (int(tokens), int(count)) == (len(known), len(lines))
    assert tpf == f"{len(known) / len(lines):.2f}"

    if source == "now":
        checkpoint = course / "runs/afternoon/sft/latest"
        model, tokenizer = load(checkpoint), load_tokenizer(checkpoint)
        engine = TorchEngine(model, 4, tokenizer.mask_token_id, stop_ids(tokenizer))
        how = Decoding(threshold=0.9, top_k=1, max_tokens=48)
        (rollout,) = engine.generate([encode_prompt(tokenizer, "3+8?")], seeds=[0], how=how)
        assert rollout.steps == [steps[position] for position in sorted(steps)]
        assert repr(tokenizer.decode(rollout.response_ids, skip_special_tokens=True)) == text


def test_noise(printed, printed_after):
    """Weights are 1/t of one t per draw; masks and prompt; the means are those of the theory."""
    for line in printed(3).splitlines()[1:4]:
        views = re.findall(r"(\d): (.{4}) x(\d\.\d+)", line)
        assert views and len({weight for *_, weight in views}) == 1
        for block, shown, weight in views:
            clean = "3+8?3+8=11 {11}."[4 * int(block) : 4 * int(block) + 4]
            assert "_" in shown and all(a in ("_", b) for a, b in zip(shown, clean, strict=True))
            assert int(block) > 0 and 1 / 0.98 <= float(weight) <= 1 / 0.02

    # Masked tokens / R, with t uniform on [0.02, 0.98]: mean E[t], variance E[t (1 - t)] / R + Var t.
    r, variance = 12, 0.96**2 / 12
    spread = math.sqrt((0.25 - variance) / r + variance)
    scored, weighed = ([float(x) for x in line.split()[-2:]] for line in printed(3).splitlines()[-2:])
    assert scored == pytest.approx([0.5, spread], abs=0.02)
    # Given t, the sum of weights / R has the mean 1 and the variance (1/t - 1) / R.
    assert weighed == pytest.approx([1, math.sqrt((math.log(49) / 0.96 - 1) / r)], abs=0.03)
    # Of a pair: (m / t + (R - m) / (1 - t)) / (2 R) with m masked in one copy, Var m = R t (1 - t).
    grid = [0.02 + 0.96 * (i + 0.5) / 10_000 for i in range(10_000)]
    of_pair = statistics.fmean((1 - 2 * t) ** 2 / (4 * r * t * (1 - t)) for t in grid)
    paired = [float(x) for x in printed_after(3).splitlines()[-1].split()[-2:]]
    assert paired == pytest.approx([1, math.sqrt(of_pair)], abs=0.03)


def test_replay(printed):
    """From the printed views alone: what each knows is what views before it revealed; and how many tokens."""
    lines = printed(4).splitlines()
    clean = {}
    for line in lines[:4]:
        _, _, block, *ids = line.split()
        clean[int(block)] = ids
    known: dict[int, list[str]] = {1: ["53", "63", "_", "_"]}  # the prompt's tail
    for number, line in enumerate(lines[4:-3], start=1):
        view, _, block, *cells = re.split(r"\s+", line)[1:]
        b, revealed = int(block), [cell.rstrip(":") for cell in cells[4::3]]
        assert int(view) == number and cells[:4] == known.setdefault(b, ["_"] * 4)
        for i, token in enumerate(clean[b]):
            if known[b][i] == "_" and revealed and token == revealed[0]:
                known[b][i] = revealed.pop(0)
        assert not revealed
        for engine, trainer in zip(cells[5::3], cells[6::3], strict=True):
            assert float(engine) == pytest.approx(float(trainer), abs=0.0011)
    assert {b: known[b] for b in (1, 2, 3)} == {b: clean[b] for b in (1, 2, 3)}
    views, length = len(lines) - 4 - 3, 16
    assert lines[-2] == "largest distance between engine and trainer: 0.000"
    assert (
        lines[-1] == f"{length + 4 * views} tokens in one row; 4 passes over [noisy | clean] are {8 * length}"
    )


@pytest.mark.parametrize("tau", [0.6, 0.8])
def test_holds(tau, printed, printed_after):
    """All draws of two positions, their rule and the mass of their holds, without a tensor."""
    first = {"a": 0.7, "b": 0.3}, {"a": 0.65, "b": 0.35}
    second = {"a_": {"a": 0.8, "b": 0.2}, "_a": {"a": 0.5, "b": 0.5}, "_b": {"a": 0.9, "b": 0.1}}
    wanted: dict[tuple, list[float]] = {}  # by (tokens, steps): probability, reveals, mass of the hold
    for left, right in product("ab", repeat=2):
        p, q = first[0][left], first[1][right]
        if p >= tau and q >= tau:
            wanted[left + right, "1 1"] = [p * q, p * q, 1.0]
            continue
        from_left = p >= tau or (q < tau and p >= q)
        bound = tau if max(p, q) >= tau else max(p, q)
        held = sum(x for x in first[1 if from_left else 0].values() if x < bound)
        for token, chance in second[left + "_" if from_left else "_" + right].items():
            key = (left + token, "1 2") if from_left else (token + right, "2 1")
            before = wanted.get(key, [0.0])[0]
            wanted[key] = [before + p * q * chance, (p if from_left else q) * chance, held]
    lines = (printed if tau == 0.6 else printed_after)(5).splitlines()
    found = {}
    for line in lines[1:-1]:
        tokens, s1, s2, *numbers = line.split()
        found[tokens, f"{s1} {s2}"] = [1.0 if n == "-" else float(n) for n in numbers]
    assert found.keys() == wanted.keys()
    for key, (probability, reveals, held) in wanted.items():
        assert found[key] == pytest.approx([probability, reveals, probability, held], abs=6e-5), key
        assert probability == pytest.approx(reveals * held), "which is what a likelihood with holds says"
    sums = [float(n) for n in lines[-1].split()[1:]]
    assert sums == pytest.approx([1, sum(reveals for _, reveals, _ in wanted.values()), 1], abs=6e-5)


def test_groups(printed, printed_after):
    for output, with_speed in ((printed(6), False), (printed_after(6), True)):
        for group in output.split("\n\n")[0].split("?  ")[1:]:
            found = re.findall(r"answer (\d+) +TPF (.*?) +reward (.*?) +advantage (\S+)", group)
            assert len(found) == 4
            gold = {"11": 1, "12": 0, "4": 1}  # of the first two questions; the third has no right answer
            rewards = []
            for answer, tpf, reward, _ in found:
                s = (1 - math.cos(math.pi * (float(tpf) - 1) / 3)) / 2
                speed = 0.5 + 0.5 * s if gold.get(answer) else -0.5 * s
                rewards.append(gold.get(answer, 0) + (speed if with_speed else 0))
                assert float(reward) == pytest.approx(rewards[-1], abs=6e-4)
            spread = statistics.pstdev(rewards)
            assert group.startswith("kept" if spread > 1e-9 else "dropped")
            for reward, (*_, advantage) in zip(rewards, found, strict=True):
                wanted = (reward - statistics.fmean(rewards)) / spread if spread > 1e-9 else 0
                assert float(advantage) == pytest.approx(wanted, abs=6e-4)


@pytest.mark.parametrize(("rate", "sampled"), [(1.0, (0.5, 0.3, 0.2)), (0.25, (0.625, 0.375, 0))])
def test_step_by_hand(rate, sampled, printed, printed_after):
    """Two updates with clipping, and the push of a constant reward, on paper."""
    output = (printed if rate == 1 else printed_after)(7)
    draws, policy = [0, 1, 1, 2], [0.5, 0.3, 0.2]
    rewards = [0, 1, 1, 0]
    advantages = [(r - 0.5) / 0.5 for r in rewards]
    assert re.findall(r"^   (\w) +(\d) +(\S+)$", output, flags=re.MULTILINE) == [
        ("abc"[v], str(r), f"{a:+.0f}") for v, r, a in zip(draws, rewards, advantages, strict=True)
    ]

    def numbers(text: str) -> list[float]:
        return [float(n) for n in re.findall(r"[+-]?\d+\.\d+", text)]

    z, old = [math.log(p) for p in policy], policy
    updates = re.split(r"update \d", output)[1:]
    assert len(updates) == 2
    for update in updates:
        p = [math.exp(x) / sum(map(math.exp, z)) for x in z]
        loss, gradient, ratios, clipped = 0.0, [0.0] * 3, [], 0
        for v, a in zip(draws, advantages, strict=True):
            rho = p[v] / old[v]
            ratios.append(rho)
            loss -= min(rho * a, min(max(rho, 0.8), 1.28) * a) / 4
            if (a > 0 and rho > 1.28) or (a < 0 and rho < 0.8):
                clipped += 1
                continue
            for u in range(3):
                gradient[u] -= a * rho * ((u == v) - p[u]) / 4
        first, second, third, *_ = update.splitlines()
        assert numbers(first) == pytest.approx(p, abs=6e-4)
        assert numbers(second) == pytest.approx(ratios, abs=6e-4) and second.endswith(f"clipped: {clipped}")
        assert numbers(third) == pytest.approx([loss, *gradient], abs=6e-4)
        z = [x - rate * g for x, g in zip(z, gradient, strict=True)]
    push = numbers(output.splitlines()[-1])
    assert push == pytest.approx([q - p for q, p in zip(sampled, policy, strict=True)], abs=6e-4)


def test_speed(printed, printed_after):
    for output, shares in ((printed(8), (0.5, 0.7, 0.95)), (printed_after(8), (0.5, 0.7, 0.99))):
        lines = output.splitlines()
        for share, line in zip(shares, lines[1:4], strict=True):
            found = re.findall(r"([\d.]+) %  TPF ([\d.]+)", line)
            for tau, (accuracy, tpf) in zip((0.9, 0.6, 0.04), found, strict=True):
                # ab has share^2, ba (1 - share)^2, aa and bb share (1 - share); at once if both reach tau.
                at_once = mistakes = 0.0
                if share >= tau:
                    at_once += share**2
                if 1 - share >= tau:
                    at_once += (1 - share) ** 2
                    mistakes = 2 * share * (1 - share) * (share >= tau)
                at_once += mistakes
                assert float(accuracy) == pytest.approx(100 * (1 - mistakes), abs=0.06)
                assert float(tpf) == pytest.approx(2 / (2 - at_once), abs=0.006)
        for tpf, line in enumerate(lines[-4:], start=1):
            s = (1 - math.cos(math.pi * (tpf - 1) / 3)) / 2
            found = [float(n) for n in re.findall(r"[+-]\d\.\d+", line)]
            assert found == pytest.approx([0.5 + 0.5 * s, -0.5 * s], abs=6e-4)


def test_a_checkpoint_that_is_not_there_is_one_line(course, zygote):
    done = zygote.run([sys.executable, "docs/lessons/2_decoding.py", "runs/nothing"], cwd=course)
    assert done.returncode == 2 and "runs/nothing" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout
