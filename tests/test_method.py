"""docs/method.py: the numbers behind every figure, recomputed in plain Python."""

import importlib.util
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def method():
    spec = importlib.util.spec_from_file_location("docs_method", ROOT / "docs/method.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def figures(method, tmp_path_factory) -> dict:
    """What every figure drew, by name; and it is a picture that is legible at 400 pixels, not a blank one."""
    folder = tmp_path_factory.mktemp("method") / "new"
    drawn = method.draw(folder)
    for name in drawn:
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.width == 800 and picture.height <= 700
            assert len(picture.convert("RGB").getcolors(10**6)) > 20, name
    return drawn


def test_the_pictures_in_git_are_those_that_are_drawn(method):
    pictures = list((ROOT / "docs/method").iterdir())
    assert {p.stem for p in pictures} == method.FIGURES.keys()
    assert sum(p.stat().st_size for p in pictures) < 300_000


def test_figures_can_be_asked_for_by_name(zygote, tmp_path):
    program = [sys.executable, ROOT / "docs/method.py"]
    done = zygote.run([*program, "hold_mass", "--out", tmp_path / "here"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (tmp_path / "here").iterdir()] == ["hold_mass.png"]
    done = zygote.run([*program, "holdmass"], cwd=tmp_path)
    assert done.returncode == 2 and "no figure 'holdmass'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_packed_row(figures):
    """a b | c d | e f clean; c d unknown; c known; e f unknown. Every pair, by the rule in words."""
    drawn = figures["packed_row"]
    tokens = [("clean", i // 2, 0) for i in range(6)]
    tokens += [("view", block, number) for number, block in ((1, 1), (2, 1), (3, 2)) for _ in range(2)]
    assert "".join("_abcdef"[i] for i in drawn["row"].ids.tolist()) == "abcdef" + "__" + "c_" + "__"
    assert [i - 6 for i in drawn["row"].scored.tolist()] == [0, 3, 4, 5], "c; then d; then e and f at once"
    for i, (kind, block, number) in enumerate(tokens):
        for j, (other_kind, other_block, other_number) in enumerate(tokens):
            if kind == "clean":
                sees = other_kind == "clean" and other_block <= block
            elif other_kind == "clean":
                sees = other_block < block
            else:
                sees = other_number == number
            assert bool(drawn["seen"][i, j]) == sees, (i, j)


def test_replayed_views(figures):
    drawn = figures["replayed_views"]
    views, steps = drawn["views"], [0, 0, *drawn["steps"]]  # the prompt's two tokens were there before
    assert drawn["steps"] == [2, 1, 3, 3, 4, 3]
    for number, (block, masked, revealed) in enumerate(
        zip(views.block, views.masked, views.is_scored, strict=True), 1
    ):
        of_block = steps[4 * block : 4 * block + 4]
        assert number in of_block
        assert masked.tolist() == [step >= number for step in of_block]
        assert revealed.tolist() == [step == number for step in of_block]
    assert len(views.block) == 4


def test_sft_noise(figures):
    drawn = figures["sft_noise"]
    for first, second in zip(drawn["copies"][::2], drawn["copies"][1::2], strict=True):
        t = np.random.default_rng(first["seed"]).uniform(0.02, 0.98)
        assert first["weight"] == pytest.approx(1 / (2 * t))
        assert second["weight"] == pytest.approx(1 / (2 * (1 - t)))
        assert not first["masked"][: drawn["prompt"]].any() and not second["masked"][: drawn["prompt"]].any()
        either = [a != b for a, b in zip(first["masked"], second["masked"], strict=True)]
        assert all(either[drawn["prompt"] :]), "each token of the response in exactly one copy of a pair"
        assert first["masked"].any() and second["masked"].any()
    assert len(drawn["copies"]) == 4 and len(drawn["text"]) == 16


def test_decoding(figures):
    drawn = figures["decoding"]
    known: set[int] = set()
    for step in drawn["steps"]:
        assert [j for j in range(4) if not step["masked"][j]] == sorted(known)
        left = {j: step["confidence"][j] for j in range(4) if j not in known}
        revealed = {j for j, c in left.items() if c >= drawn["threshold"]} or {max(left, key=left.get)}
        assert {j for j in range(4) if step["revealed"][j]} == revealed
        known |= revealed
    assert len(known) == 4


def test_hold_mass(figures):
    drawn = figures["hold_mass"]
    assert sum(drawn["p"]) == pytest.approx(1)
    for bound, mass in zip(drawn["bounds"], drawn["mass"], strict=True):
        assert mass == pytest.approx(sum(p for p in drawn["p"] if p < bound), abs=1e-6), bound
    assert set(drawn["p"]) <= set(drawn["bounds"]), "the bounds are also tried where a token lies on them"
    assert drawn["at_shown"] == pytest.approx(0.15 + 0.10 + 0.06 + 0.04)


def test_advantages(figures):
    drawn = figures["advantages"]
    for rewards, advantages in zip(drawn["rewards"], drawn["advantages"], strict=True):
        spread = statistics.pstdev(rewards)
        wanted = [(r - statistics.fmean(rewards)) / spread if spread else 0.0 for r in rewards]
        assert advantages == pytest.approx(wanted)
    assert sorted(any(a) for a in drawn["advantages"]) == [False, True, True]


def test_surrogate(figures):
    """Flat above 1.28 if the advantage is positive, below 0.8 if it is negative, and nowhere else."""
    drawn = figures["surrogate"]
    for name, sign in (("better", 1), ("worse", -1)):
        curve, flat = drawn[name], []
        for rho, value, gradient in zip(drawn["ratios"], curve["value"], curve["gradient"], strict=True):
            clipped = min(max(rho, 0.8), 1.28)
            assert value == pytest.approx(min(sign * rho, sign * clipped), abs=1e-6)
            stopped = rho > 1.28 if sign > 0 else rho < 0.8
            assert gradient == pytest.approx(0 if stopped else -sign * rho, abs=1e-5)
            flat += [rho] if gradient == 0 else []
        edge = min(flat) if sign > 0 else max(flat)
        assert edge == pytest.approx(1.28 if sign > 0 else 0.8, abs=0.0051), "a step of the grid"
        assert (max(flat) if sign > 0 else min(flat)) == (drawn["ratios"][-1 if sign > 0 else 0])


def test_speed_reward(figures):
    drawn = figures["speed_reward"]
    assert (drawn["tpf"][0], drawn["tpf"][-1]) == (1, 4)
    for tpf, right, wrong in zip(drawn["tpf"], drawn["right"], drawn["wrong"], strict=True):
        s = (1 - math.cos(math.pi * (tpf - 1) / (drawn["block_size"] - 1))) / 2
        assert (right, wrong) == (pytest.approx(0.5 + 0.5 * s), pytest.approx(-0.5 * s))


def test_cost(figures):
    drawn = figures["cost"]
    length = drawn["prompt"] + drawn["response"]
    assert drawn["published"] == drawn["block_size"] * 2 * length
    assert (drawn["tpf"][0], drawn["tpf"][-1]) == (1, 4)
    for tpf, packed in zip(drawn["tpf"], drawn["packed"], strict=True):
        assert packed == pytest.approx(length + drawn["response"] * drawn["block_size"] / tpf)
