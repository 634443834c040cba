r"""Answers: does what stands in the box mean the same as the gold answer?

`extract_answer` finds the box, `normal_form` gives LaTeX one spelling, and `compare` goes by
structure: it takes lists, sets, tuples, intervals and matrices apart, then equations, units,
numbers and words. math-verify is asked only about single expressions, where it is right. (Alone it
reads `Tom` as T*o*m and so as `Mot`, `5 km` as `5 m`, `3m` as `3`, `R` as `r`, `5'` as `5`, `6:00` as
`7:00`, and takes any two equations without solutions for the same.)

    any order     lists `1,2` (also `or`, `\pm`), sets `\{1,2\}`, unions of intervals
    in order      tuples, intervals with their brackets, matrices; `3,2` will do for `(3,2)`, `1:2` for 1/2
    chains        the last value counts: `|AB| = 2 + 3 = 5`. A left side names the value, if it is no sum or
                  multiple of unknowns, or if the value is a number; `5x - 7y = 0` is no way to say 0
    one side only a unit, a percent or degree sign, a base, `x =`: not held against the answer, as the
                  question has settled it; what both sides write must agree, or convert (km and m)
    decimals      exact, except that six digits or more may be the rounding of what is no decimal
    spaces        `1 2` is not 12, and `1 1/2` not 11/2; `10 000` is one number
    letters       R is not r, x' not x; words are the same with capitals, and never products of letters
    sentences     `The answer is 5` is not 5: a sentence may deny or hedge what it ends in. Only `for all x`
                  is passed over, and what follows `where` if the gold answer has such a condition

The policy writes the answers, so they are hostile sooner or later: `9^{9^{9^{9}}}` never finishes.
`judge_all` therefore compares in worker processes which the kernel ends at a limit of processor time; a
Python-level timeout would not interrupt a single long multiplication in C. POSIX only. `quick_verdict`
is safe anywhere, and enough for most answers.

Left out on purpose: answers outside a box, radians against degrees, numbers as words; threads and forks
of this process (they would share the workers' pipes).
"""

import atexit
import contextlib
import functools
import json
import logging
import math
import os
import re
import selectors
import signal
import subprocess
import sys
import unicodedata
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Context, Decimal, Overflow
from fractions import Fraction
from operator import methodcaller
from pathlib import Path
from typing import Any, NamedTuple

MEMORY_BYTES = 280 * 2**20  # memory of a worker, without files that it maps; math-verify needs 0.1 GiB
START_SECONDS = 120  # importing sympy from a cold network disk can take a while
SECONDS = 2.0  # processor time for one comparison; honest ones take a few hundredths
MAX_CHARS = 2_000  # a longer answer is no final answer, and parsing time grows with the length
MAX_DEPTH = 40  # brackets within brackets; parsing time grows faster than the depth

# A backslash and what follows it are one token, so `\{` and `\}` do not count as braces. Two
# backslashes before `boxed` are allowed: a line break, or an answer that was escaped twice.
TOKEN = re.compile(r"(?P<box>\\\\?boxed\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)


class Verdict(NamedTuple):
    """Whether an answer is right, and why in a few words."""

    equal: bool
    why: str


def extract_answer(text: str) -> str | None:
    r"""Content of the `\boxed{...}` that closes last, exactly as written; None if no box closes.

    A box that never closes is no answer, but does not hide a closed one before or inside it. Of
    nested boxes the outer one counts. One pass over the text: linear time for any input.
    """
    last = None  # span of the box that closed last
    stack: list[int | None] = []  # one entry per open brace: where a box's content starts, or None
    for token in TOKEN.finditer(text):
        if token["box"]:
            stack.append(token.end())
        elif token["open"]:
            stack.append(None)
        elif token["close"] and stack:
            start = stack.pop()
            if start is not None:
                last = start, token.start()
    return text[slice(*last)] if last else None  # cut once: nested boxes would be copied per level


GOLD_NAMES = ("ground_truth_answer", "answer", "final_answer")


def gold_answer(record: dict) -> str:
    """The gold answer of a question's record, which may be published in several forms; "" if it has none.

    What stands behind #### (GSM8K); several as one list, and with its unit (OlympiadBench).
    """
    gold = next(filter(None, (_gold_text(record.get(name)) for name in GOLD_NAMES)), "")
    unit = record.get("unit")
    return f"{gold} {unit.strip()}" if gold and isinstance(unit, str) and unit.strip() else gold


def _gold_text(value: Any) -> str:
    """A text, a number, or a list of them as one text; "" for what is no answer: null, true, nan, {}."""
    if isinstance(value, list):
        parts = ["" if isinstance(part, list) else _gold_text(part) for part in value]
        return ", ".join(parts) if all(parts) else ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        return ""
    text = str(value).rpartition("####")[2].strip()
    return text if any(c.isprintable() and c != " " for c in text) else ""


def tolerance_of(error: Any) -> float | None:
    """How far a number may be from the gold one: `error` of a question's record; None: it has none.

    OlympiadBench gives one tolerance, or one per answer as in `1e-1,1e-2`: the first.

    Raises:
        ValueError: it is no finite number of 0 or more.
    """
    if isinstance(error, bool) or not isinstance(error, str | int | float | None):
        raise ValueError(error)
    if not error:
        return None
    tolerance = float(str(error).strip(",").split(",")[0])
    if not 0 <= tolerance < math.inf:
        raise ValueError(error)
    return tolerance


UNICODE = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "π": r"\pi ", "θ": r"\theta "}
    | {"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∪": r"\cup ", "∈": r"\in ", "\xa0": " "}
    | {"°": r"^\circ ", "∞": r"\infty ", "′": "'", "’": "'", "⟨": "(", "⟩": ")"}
    | {c: r"\frac{" + unicodedata.normalize("NFKC", c).replace("⁄", "}{") + "}" for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}
)
RAISED, LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "₀₁₂₃₄₅₆₇₈₉₊₋ₙ"
SCRIPTS = str.maketrans(RAISED + LOWERED, 2 * "0123456789+-n")
ZEROS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}


def _plain(text: str) -> str:
    """LaTeX for what Unicode has a character for: `x²`, `½`, `√2`."""
    for sign, characters in (("^", RAISED), ("_", LOWERED)):
        text = re.sub(f"([{characters}]+)", rf"{sign}{{\1}}", text)
    text = text.translate(UNICODE).translate(SCRIPTS)
    return re.sub(r"√\s*(?:(\d+|[A-Za-z])|\(([^()]*)\))", r"\\sqrt{\1\2}", text).replace("√", r"\sqrt ")


def _repeating(found: re.Match) -> str:
    r"""`1.2\overline{34}` as a fraction: (1234 - 12) / 990."""
    whole, start, period = found.groups()
    top = int(whole + start + period) - int(whole + start or 0)
    return rf"\frac{{{top}}}{{{'9' * len(period)}{'0' * len(start)}}}"


def _in_digits(found: re.Match) -> str:
    """`5.25 million` as 5250000."""
    whole, decimals, zeros = found[1].replace(",", ""), found[2] or "", ZEROS[found[3]]
    return f"{whole}{decimals[:zeros].ljust(zeros, '0')}.{decimals[zeros:]}".rstrip(".")


# In this order. (?<!\\) keeps the second half of a matrix's `\\` out of it; "whole" matches all or nothing.
REWRITES = [
    # what surrounds: boxes, dollars, sizes of brackets; thousands; spaces
    (r"\\boxed\s*\{(.*)\}|\*\*(.*)\*\*", r"\1\2", "whole"),
    (r",\s*\\!\s*(?=\d{3})", ","),
    (r"\\\\\[-?[\d.]+ ?[a-z]{2}\]", r"\\\\"),
    (r"\\text\{[^{}]*$", ""),  # a text that was cut off
    (r"(?<!\\)\$\s*,|,\s*\$", ", "),  # `$35$,$129$` are two
    (r"(?<!\\)\\[()\[\]!]|(?<!\\)\$|\\displaystyle", ""),
    (r"\\(?:left|right)\.|\\(?:left|right|[bB]igg?[lr]?)(?![a-z])", ""),
    (r"(?<=\d)(?:\{,\}|,?\\,)(?=\d)", ","),
    (r"!=(?:(?<=\s!=)|(?<=^[x-z]!=))", r"\\ne "),  # and no factorial
    (r"(?:(?<!\\)\\[,;: ]|~|\\q?quad(?![a-z])|\s)+", " "),  # no two spaces from here on
    (r"(\d{1,3}(?: \d{3})+)", lambda m: m[1].replace(" ", ""), "whole"),
    (r"(?<=[a-z}])\{(\d{1,3}(?:,\d{3})+)\}", lambda m: "{" + m[1].replace(",", "") + "}"),
    (r"[A-Za-z](\([^()\[\]]*\]|\[[^()\[\]]*\))[ .]*", r"\1", "whole"),  # `t(0,4]`
    # other names for the same command; degrees, percent, separators, money
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\(l|g)(?:e|eq|eqslant)(?![a-z])", r"\\\1e "),
    (r"(?:<|\\lt(?![a-z]))(=?)", lambda m: r"\le " if m[1] else "<"),
    (r"(?:>|\\gt(?![a-z]))(=?)", lambda m: r"\ge " if m[1] else ">"),
    (r"\\colon(?![a-z])", ":"),
    (r"\\[lr]angle(?![a-z])", lambda m: "(" if m[0] == r"\langle" else ")"),
    (r"\^\s*\{?\s*\\prime\s*\}?", "'"),
    (r"(?<![\d.])(\d{0,30})\.(\d{0,30})\\(?:overline|bar|dot)\s*\{?(\d{1,30})\}?", _repeating),
    (r"\\(?:math|text)rm\s*\{([ei])\}", r"\1"),
    (r"\\(?:math|text)(?:rm|bf|it|sf|normal)\s*\{|\\(?:mbox|operatorname\*?|text)\s*\{", r"\\text{"),
    (r"\s*\^\s*\{?\s*\\circ\s*\}?|\\degrees?(?![a-z])|\\text\{\s*degrees?\s*\}", "°"),
    (r"\\%|\\text\{\s*(?:\\?%|percent)\s*\}|\s*\bpercent\b", "%"),
    (rf"\\text\{{\s*({'|'.join(ZEROS)})\b\s*([^{{}}]*)\}}", r"\1\\text{\2}"),
    (r"\\text\{\s*\}", ""),
    (rf"(?<![\d.,])(\d{{1,3}}(?:,\d{{3}})+|\d+)(?:\.(\d+))? ?({'|'.join(ZEROS)})(?![a-z])", _in_digits),
    (r"\\text\{([^{}^]*)\^\s*\{?\s*(-?\d)\s*\}?\s*\}", r"\\text{\1}^{\2}"),
    (r",?\s*(?:\\text\{\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))|;", ","),
    (r"\\text\{([^{}\d,;]*[\d,;][^{}]*)\}", r"\1", "whole"),
    (r"\\\$\s*([\d.,]*\d)", r"\1\\text{dollars}"),
    (r"(?<![\d,(\[{])(\d{1,3}(?:,\d{3})+)(?![\d)\]}]|,\d)", lambda m: m[1].replace(",", "")),
    # arguments without braces, commands without backslash
    (r"\\frac\s*([0-9a-z])\s*(?=[0-9a-z{\\])", r"\\frac{\1}"),
    (r"(\\frac\{[^{}]*\})\s*([0-9a-z])", r"\1{\2}"),
    (r"\\sqrt\s*([0-9a-z])", r"\\sqrt{\1}"),
    (r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<![\\A-Za-z])(pi|theta|alpha|beta|sin|cos|tan|cot|sec|csc|log|ln|infty)(?![A-Za-z])", r"\\\1 "),
    (r"(?<![\\A-Za-z])inf(?:inity)?(?![A-Za-z])", r"\\infty "),
    (r"\\(?:emptyset|varnothing)", r"\\{\\}"),
    (r"\*\*", "^"),
    (r"([\^_])\s*(-?\d+|[A-Za-z])", r"\1{\2}"),
    # a leading `x \\in`, marks at the ends, spaces that separate no words
    (r"^\\?[A-Za-z](?:_\{\w+\})?\s*\\in(?![a-z])|(?<![\s.,:])[\s.,:]+$|^[\s,+]+", ""),
    (r"(?<=\d) +(?=[A-Za-z])|(?<![A-Za-z0-9]) +| +(?![A-Za-z0-9])", ""),
]  # fmt: skip
REWRITES = [  # templates as functions: called only where the pattern is found
    (re.compile(p, re.DOTALL), r if callable(r) else methodcaller("expand", r), bool(whole))
    for p, r, *whole in REWRITES
]


@functools.lru_cache(maxsize=2**14)
def normal_form(text: str) -> str:
    """One spelling for what LaTeX spells in many ways, without white space that means nothing."""
    text = text.strip()
    if text.isdecimal():  # most answers: nothing to rewrite
        return text
    if not text.isascii():
        text = _plain(text)
    for pattern, replacement, whole in REWRITES:
        if not whole:
            text = pattern.sub(replacement, text)
        elif found := pattern.fullmatch(text):
            text = replacement(found)
    return text.strip()


_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"  # one way to match only: `\d+\.?\d*` made NUMBER cubic on long digits
NUMBER = re.compile(
    rf"([+-]?)(?:({_DECIMAL})|(?:(\d+) ?)?\\frac\{{([+-]?{_DECIMAL})\}}\{{([+-]?{_DECIMAL})\}}"
    rf"|(?:(\d+) )?({_DECIMAL})/({_DECIMAL}))"
)


def number(text: str) -> Fraction | None:
    r"""The value of a decimal, a fraction or a mixed number (`1\frac45`, `1 4/5`) in normal form."""
    found = NUMBER.fullmatch(text)
    if not found:
        return None
    sign, decimal, whole, top, bottom, whole2, top2, bottom2 = found.groups()
    if decimal:
        value = Fraction(decimal)
    else:
        divisor = Fraction(bottom or bottom2)
        if not divisor or (whole and (top + bottom).strip("0123456789.")):
            return None
        value = Fraction(whole or whole2 or 0) + Fraction(top or top2) / divisor
    return -value if sign == "-" else value


def quick_verdict(answer: str, gold: str, tolerance: float | None) -> Verdict | None:
    """The verdict where it is cheap and safe to find, which is on most answers; None elsewhere."""
    if not answer.strip():
        return Verdict(False, "no answer")
    if max(len(answer), len(gold)) > MAX_CHARS:
        return Verdict(answer.strip() == gold.strip(), f"longer than {MAX_CHARS} characters")
    if "".join(answer.split()) == "".join(gold.split()) and _spaced(answer) == _spaced(gold):
        return Verdict(True, "same text")
    if _depth(answer) > MAX_DEPTH:
        return Verdict(False, f"brackets more than {MAX_DEPTH} deep")
    answer, gold = _normal_forms(answer, gold)
    if not answer or answer == gold:
        return Verdict(answer != "", "same normal form" if answer else "no answer")
    if number(answer) is not None and number(gold) is not None:
        return _compare_numbers(answer, gold, tolerance)
    return None


def _spaced(text: str) -> str:
    """A text without the white space that separates neither words nor numbers: `1 2` is not 12."""
    return re.sub(r"(?<!\w) | (?!\w)", "", " ".join(text.split()))


def _normal_forms(answer: str, gold: str) -> tuple[str, str]:
    """Both in normal form, each read in the light of the other.

    `200,807` is one number, except where the other side has several: then it is a list. `for all x` says
    nothing, and a condition behind `where` is not asked for if the gold answer has one.
    """
    for word in ("for all ", "for any ", "for every ", *["where"] * ("where" in gold)):
        answer, gold = answer.partition(word)[0], gold.partition(word)[0]
    form, gold_form = normal_form(answer), normal_form(gold)
    if ("," in form or r"\pm" in form) and THOUSANDS.fullmatch(gold):
        gold_form = gold.strip("$ ")
    if "," in gold_form and THOUSANDS.fullmatch(answer):
        form = f"({answer.strip('$ ')})"  # in order: 1,234 is not the list 234, 1
    return form, gold_form


THOUSANDS = re.compile(r"[$ ]*-?\d{1,3}(?:,\d{3})+[$ ]*")


def _compare_numbers(answer: str, gold: str, tolerance: float | None) -> Verdict:
    a, g = number(answer), number(gold)
    if tolerance is not None:
        return Verdict(abs(a - g) <= Fraction(str(tolerance)), f"numbers, within {tolerance}")
    # 0.333333 is right for 1/3, and 0.333 is not. Two decimals are compared exactly.
    digits = [_decimals(text) for text in (answer, gold)]
    rounded = _is_rounded(a, g, *digits)
    return Verdict(a == g or rounded, "decimal of at least six digits" if rounded else "numbers")


def _decimals(text: str) -> int | None:
    """Digits after the point of a decimal, None for anything else."""
    found = re.fullmatch(r"[+-]?\d*\.(\d*)", text)
    return len(found[1]) if found else None


def _is_rounded(a, g, *digits: int | None) -> bool:
    """Whether the one of the two that is a decimal agrees with the other to its last digit."""
    count = max(d or 0 for d in digits)
    close = digits.count(None) == 1 and count >= 6 and abs(a - g) < Fraction(1, 10**count)
    return bool(close and abs(a - g) * 10**5 < abs(g))  # six zeros after the point say nothing


def split(text: str, separator: str) -> list[str]:
    """Parts of a text between the separators that stand outside all brackets."""
    parts, depth, start = [], 0, 0
    for token in re.finditer(r"\\begin|\\end|[(\[{]|[)\]}]|" + re.escape(separator), text):
        if token[0] == separator:
            if depth == 0:
                parts.append(text[start : token.start()])
                start = token.end()
        else:
            depth += 1 if token[0] in ("\\begin", "(", "[", "{") else -1
    return [*parts, text[start:]]


MATRIX = re.compile(
    r"[(\[]?\\begin\{((?:small)?[pbB]?matrix|array)\}(?:\{[clr|]+\})?(.*?)\\end\{\1\}[)\]]?", re.DOTALL
)


def matrix(text: str) -> list[list[str]] | None:
    """The rows of a matrix, or of a sum of multiples of matrices; None for anything else."""
    total, end = [], 0
    for found in MATRIX.finditer(text):
        # What stands before it: nothing, a sign or a factor; before all but the first also a sign.
        factor = re.sub(r"\\(?:cdot|times) ?$", "", text[end : found.start()])
        end = found.end()
        sums = any(len(split(factor[1:], sign)) > 1 for sign in "+-=")
        if sums or r"\begin" in found[2] or (total and factor[:1] not in ("+", "-")):
            return None

        # Its rows, times the factor, added to those before it.
        rows = [row.split("&") for row in re.sub(r"\\\\\s*$", "", found[2]).split(r"\\")]
        times = {"": "", "+": "", "-": r"(-1)\cdot"}.get(factor, rf"({factor})\cdot")
        rows = [[f"{times}({cell.strip()})" if times else cell.strip() for cell in row] for row in rows]
        if total and list(map(len, total)) != list(map(len, rows)):
            return None
        pairs = zip(total, rows, strict=True) if total else []
        total = [["+".join(cells) for cells in zip(*pair, strict=True)] for pair in pairs] or rows
    return total if end == len(text) else None


def shape(text: str) -> tuple[str, list[str]]:
    r"""What a normal form is made of: its kind and its parts.

    >>> shape("1,2"), shape(r"\{1,2\}"), shape("(1,2]"), shape("x+1")
    (('list', ['1', '2']), ('set', ['1', '2']), ('(]', ['1', '2']), ('single', ['x+1']))
    """
    items = split(text, ",")
    braces = re.fullmatch(r"\\?\{(.*?)\\?\}", text, re.DOTALL)
    if len(items) == 1 and braces and _is_balanced(braces[1]):
        return "set", _both_signs(split(braces[1], ",")) if braces[1] else []
    items = _both_signs(items)
    if len(items) > 1:
        return "list", items
    if len(parts := split(text, r"\cup")) > 1:
        return "union", parts
    if r"\begin" in text and (rows := matrix(text)):
        return f"{len(rows)} x {len(rows[0])} matrix", [cell for row in rows for cell in row]
    if len(parts := split(text, ":")) > 1 and "=" not in text:
        return "ratio", parts
    if text[:1] in ("(", "[") and text[-1] in ")]" and _is_balanced(text[1:-1]):
        parts = split(text[1:-1], ",")
        if len(parts) > 1:
            return text[0] + text[-1], parts
    return "single", [text]


def _both_signs(items: list[str]) -> list[str]:
    r"""`1\pm x` as the two values it stands for."""
    signs = [(r"\pm", "+", "-"), (r"\mp", "-", "+")]
    result = []
    for item in items:
        if not re.search(r"\\(pm|mp)(?![a-z])", item):
            result.append(item)
            continue
        for which in (1, 2):
            text = item
            for sign in signs:
                text = text.replace(sign[0], sign[which])
            result.append(text.lstrip("+").replace("=+", "="))
    return result


def _is_balanced(text: str) -> bool:
    return _depth(text) >= 0


def _depth(text: str) -> int:
    """How deep the brackets of a text are nested, whatever their kinds; -1 if they do not pair up."""
    depth = deepest = 0
    pairs = True
    for token in re.finditer(r"[(\[{]|[)\]}]", text):
        depth += 1 if token[0] in "([{" else -1
        deepest, pairs = max(deepest, depth), pairs and depth >= 0
    return deepest if (pairs and depth == 0) or deepest > MAX_DEPTH else -1


RELATIONS = re.compile(r"<|>|\\[lg]e(?![a-z]) ?|=")


def _as_interval(text: str) -> str:
    r"""`x\ge 2` as `[2,\infty)`, `1<x<2` as `(1,2)`, `x=3` as `\{3\}`; anything else as it is."""
    values, signs = RELATIONS.split(text), [sign.strip() for sign in RELATIONS.findall(text)]
    if signs == ["="]:
        return rf"\{{{values[1]}\}}"
    if set(signs) <= {">", r"\ge"}:
        values, signs = values[::-1], signs[::-1]
    elif not set(signs) <= {"<", r"\le"}:
        return text
    if len(values) == 2:  # one end is infinite
        below = values[0].isalpha()
        values = [r"-\infty", *values] if below else [*values, r"\infty"]
        signs = ["<", *signs] if below else [*signs, "<"]
    if len(values) != 3 or not values[1].isalpha():
        return text
    return ("[" if "e" in signs[0] else "(") + f"{values[0]},{values[2]}" + ("]" if "e" in signs[1] else ")")


def _is_name(text: str) -> bool:
    """Whether what stands left of a `=` may name the value: `|AB|`, `f^{-1}(x)`, not `2x`, `x^2`, `x+y`."""
    relation = re.search(r"^[-+\d.]|^[A-Za-z]\^\{\d|[<>]|\\(?:[lg]e|ne|pm|mp)(?![a-z])", text)
    sums = any(len(split(text, sign)) > 1 for sign in "+-")
    return bool(re.search("[A-Za-z]", text) and not relation and not sums)


def compare(answer: str, gold: str, tolerance: float | None = None) -> Verdict:
    """Verdict on two normal forms. May run for ever: see the top of this file."""
    if answer == gold:
        return Verdict(True, "same normal form")
    (kind, items), (gold_kind, gold_items) = shape(answer), shape(gold)
    kinds = {kind, gold_kind}
    if kinds == {"set", "single"} and len(items) == len(gold_items) == 1:
        return compare(items[0], gold_items[0], tolerance)
    if kinds <= {"list", "set"} or kinds == {"union"}:
        verdict = _match(items, gold_items, tolerance, f"parts of a {gold_kind} in any order")
        if verdict.equal or kinds != {"union"}:
            return verdict
        return _compare_expressions(answer, gold, tolerance)  # pieces that touch may be merged
    if kind == gold_kind != "single" or kinds == {"list", "()"}:
        equal = len(items) == len(gold_items) and all(
            compare(a, g, tolerance).equal for a, g in zip(items, gold_items, strict=True)
        )
        return Verdict(equal, f"parts of a {gold_kind} in order")
    if kinds == {"list", "union"}:  # x<1 or x>2
        union, gold_union = (r"\cup".join(map(_as_interval, parts)) for parts in (items, gold_items))
        return compare(union, gold_union, tolerance)
    if (kind == "single" and "=" in answer) or (gold_kind == "single" and "=" in gold):
        return _compare_named(answer, gold, tolerance)
    if kinds == {"ratio", "single"} and len(items) + len(gold_items) == 3:
        fraction = rf"\frac{{{items[0]}}}{{{items[-1]}}}" if kind == "ratio" else answer
        gold_fraction = rf"\frac{{{gold_items[0]}}}{{{gold_items[-1]}}}" if gold_kind == "ratio" else gold
        return compare(fraction, gold_fraction, tolerance)
    rest = kinds - {"single", "union"}  # an interval may also be an inequality, or pieces joined
    if len(rest) > 1 or not rest <= {"()", "(]", "[)", "[]"}:
        return Verdict(False, f"a {kind} is no {gold_kind}")
    return _compare_named(answer, gold, tolerance)


def _match(items: list[str], gold_items: list[str], tolerance: float | None, why: str) -> Verdict:
    """Every part has its partner, each used once; parts that are spelled alike go first."""
    if len(items) != len(gold_items):
        return Verdict(False, f"{len(items)} parts, not {len(gold_items)}")
    left = list(gold_items)
    rest = [item for item in items if item not in left or left.remove(item)]
    for item in rest:
        partner = next((gold for gold in left if compare(item, gold, tolerance).equal), None)
        if partner is None:
            return Verdict(False, why + f": {item} has no partner")
        left.remove(partner)
    return Verdict(True, why)


def _compare_named(answer: str, gold: str, tolerance: float | None) -> Verdict:
    """`x = 5` against `5`, `f(x) = x` against `f(t) = t`, equations against equations."""
    (*names, value), (*gold_names, gold_value) = split(answer, "="), split(gold, "=")
    if names and gold_names and (names[0] == gold_names[0] or _same_function(names[0], gold_names[0])):
        variable, gold_variable = names[0][-2:-1], gold_names[0][-2:-1]
        if names[0] != gold_names[0]:
            value = re.sub(rf"(?<![\\A-Za-z]){variable}(?![A-Za-z])", gold_variable, value)
        if _is_name(gold_names[0]):
            return compare(value, gold_value, tolerance)
    if names and not gold_names:
        # The question asks for x + y, and the answer says x + y = 5. But 2x - y = 0 is no way to say 0.
        named = _is_name(names[0]) or not re.search("[A-Za-z]", names[0])
        is_value = number(gold) != 0 and not re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", gold))
        if (named or is_value) and not re.search(r"[<>]|\\[lgn]e\b", answer + gold):
            return compare(value, gold, tolerance)
    if gold_names and not names and _is_name(gold_names[0]):
        return compare(answer, gold_value, tolerance)
    if names and gold_names:
        return _compare_expressions(answer, gold, tolerance)
    if names or gold_names:
        return Verdict(False, "an equation is no value")
    return _compare_quantities(answer, gold, tolerance)


def _same_function(name: str, gold_name: str) -> bool:
    """`f(t)` and `f(x)`: the letter of the argument is free."""
    return name[:-2] == gold_name[:-2] and bool(re.fullmatch(r"[A-Za-z]\([a-z]\)", name))


# name: (dimension, how many of its base unit), and what else it is called
_UNITS = """m:metre,meter=m 1|km:kilometre,kilometer=m 1000|cm:centimetre,centimeter=m 1/100
mm:millimetre,millimeter=m 1/1000|inch:in,inche=m 127/5000|ft:foot,feet=m 381/1250|yd:yard=m 1143/1250
mi:mile=m 201168/125|g:gram=g 1|kg:kilogram=g 1000|mg:milligram=g 1/1000|lb:pound=lb 1|oz:ounce=lb 1/16
s:sec,second=s 1|min:minute=s 60|h:hr,hour=s 3600|day:d=s 86400|week:wk=s 604800|year:yr=year 1
month:mo=year 1/12|dollar:usd,buck=$ 1|cent:=$ 1/100|l:litre,liter=l 1|ml:millilitre,milliliter=l 1/1000
degree:deg,°=° 1|%:=% 1|mph:=mph 1|unit:="""  # "unit" says nothing
UNITS = {
    name: tuple(meaning.split())
    for entry in _UNITS.replace("\n", "|").split("|")
    for names, _, meaning in [entry.partition("=")]
    for name in re.split("[:,]", names)
    if name
}
_TEXT = r"\\text\{[^{}]*\}"
UNIT = re.compile(rf"(.*[^-+*/^_({{\s])\s*((?:{_TEXT}|[°%])(?:/[a-z]+|/?{_TEXT}|\^\{{-?\d\}})*)", re.DOTALL)
BARE_UNIT = re.compile(
    r"([-+\d./ ]*\d|.*\\frac\{[^{}]*\}\{[^{}]*\}|.*\\sqrt\{[^{}]*\})\s*([A-Za-z][A-Za-z /.]+(?:\^\{\d\})?)"
)
BASE = re.compile(r"([0-9A-F]+)_\{(?:\\text\{)?(\w+)\}?\}")


def split_unit(text: str) -> tuple[str, dict[str, int] | None, Fraction]:
    """The value of a normal form, the dimensions of its unit (None: no unit) and its factor.

    >>> split_unit("5km")
    ('5', {'m': 1}, Fraction(1000, 1))
    """
    # A number of another base, or a value with a unit behind it.
    if found := BASE.fullmatch(text):
        return found[1], {"base " + found[2]: 1}, Fraction(1)
    found = UNIT.fullmatch(text) or BARE_UNIT.fullmatch(text)
    if not found or (found.re is BARE_UNIT and not _is_unit(found[2])):
        return text, None, Fraction(1)

    # The unit, name by name: m^2 / s has the dimensions m: 2, s: -1.
    dimensions, factor, sign = {}, Fraction(1), 1
    unit = re.sub(r"\\text|[{}.]", " ", found[2]).lower()
    unit = re.sub(
        r"\b(square|sq|cubic|cu)\s+(\w+)", lambda m: m[2] + ("^2" if m[1][0] == "s" else "^3"), unit
    )
    for name, power in re.findall(r"([a-z°%]+|/)\s*(?:\^\s*(-?\d))?", re.sub(r"\bper\b", "/", unit)):
        if name == "/":
            sign = -1
            continue
        singular = name.removesuffix("s") if len(name) > 2 else name
        dimension, size = UNITS.get(name) or UNITS.get(singular, (singular, 1)) or ("", 1)
        exponent = sign * int(power or 1)
        dimensions[dimension] = dimensions.get(dimension, 0) + exponent
        factor *= Fraction(size) ** exponent
    dimensions = {name: power for name, power in dimensions.items() if name and power}
    return found[1], dimensions or None, factor


def _is_unit(text: str) -> bool:
    """Whether letters behind a number, without `\text`, are a unit or a noun: `5m` is 5 times m."""
    words = re.findall("[A-Za-z]+", text)
    return all(_is_word(w) or (len(w) > 1 and w.lower() in UNITS) or w in ("h", "sq", "cu") for w in words)


def _compare_quantities(answer: str, gold: str, tolerance: float | None) -> Verdict:
    """Values with their units: `1.5` hours are `90` minutes."""
    value, unit, factor = split_unit(answer)
    gold_value, gold_unit, gold_factor = split_unit(gold)
    if unit is None and gold_unit is None:  # `5` and `5 units`
        return _compare_single(value, gold_value, tolerance)
    if unit is not None and gold_unit is not None:
        if unit != gold_unit:
            return Verdict(False, "different units")
        if factor != gold_factor:
            ratio = factor / gold_factor
            value = _scaled(value, ratio)
        return compare(value, gold_value, tolerance)
    verdict = compare(value, gold_value, tolerance)
    if not verdict.equal and {"%": 1} in (unit, gold_unit):  # 50 % is 50 or 0.5
        ratio = Fraction(1, 100) if unit else Fraction(100)
        verdict = compare(_scaled(value, ratio), gold_value, tolerance)
    return verdict


def _scaled(value: str, ratio: Fraction) -> str:
    exact = number(value)
    if exact is None:
        return rf"({value})\cdot\frac{{{ratio.numerator}}}{{{ratio.denominator}}}"
    return _fraction(exact * ratio)


def _fraction(value: Fraction) -> str:
    return f"{value.numerator}/{value.denominator}"


def _is_word(letters: str) -> bool:
    """Whether a run of letters is a word, and not a product of variables such as ab, xyz or RC."""
    if len(letters) < 3:
        return (letters.istitle() and len(letters) == 2) or letters in ("no", "up")
    return not letters.islower() or len(letters) > 4 or bool(set(letters) & set("aeiou") - set("abcd") or
        set("a") & set(letters) and not set(letters) <= set("abcd"))  # fmt: skip


def _words(text: str) -> str | None:
    """A text answer in small letters without its marks; None for mathematics."""
    plain = re.sub(r"\\text|[{}]", "", text)
    if choice := re.fullmatch(r"\(?([A-Z])\)?[.:)]?", plain):
        return choice[1]
    letters = re.findall("[A-Za-z]+", plain)
    if re.search(r"[^A-Za-z\s.,'’!?-]", plain) or not letters:
        return None
    if r"\text" in text or any(map(_is_word, letters)):
        return " ".join(letters).casefold()
    return None


def _compare_single(answer: str, gold: str, tolerance: float | None) -> Verdict:
    """Numbers as numbers, words as words, the rest as expressions."""
    if number(answer) is not None and number(gold) is not None:
        return _compare_numbers(answer, gold, tolerance)
    if any(number(text) is None and re.search(r"\d \d", text) for text in (answer, gold)):
        return Verdict(False, "numbers side by side: only the same text is equal")
    words, gold_words = _words(answer), _words(gold)
    if words is not None or gold_words is not None:
        return Verdict(words == gold_words, "words")
    for text in (answer, gold):
        mathematics = re.sub(r"\\(?!text)[A-Za-z]+", " ", text)
        if r"\text" in mathematics or any(map(_is_word, re.findall("[A-Za-z]+", mathematics))):
            return Verdict(False, "words within an expression: only the same text is equal")
    answer, gold = (  # mixed numbers, which sympy takes for products
        text if number(text) is None or _decimals(text) is not None else _fraction(number(text))
        for text in (answer, gold)
    )
    return _compare_expressions(answer, gold, tolerance)


@functools.lru_cache(maxsize=1024)
def _parse(text: str):
    """A sympy object, from LaTeX only: nothing is evaluated as Python. None if it cannot be read."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy

    # Without its units: it takes the variable of 3m for metres and drops it. With capitals: R is not r.
    rules = NormalizationConfig(basic_latex=True, malformed_operators=True)
    how = {"normalization_config": rules, "conversion_config": ConversionConfig(lowercase_symbols=False)}
    try:
        parsed = latex2sympy(text.replace("°", r"^{\circ}").replace("%", r"\%"), is_real=True, **how)
    except Exception:  # noqa: BLE001  of many kinds
        return None
    return parsed.subs(sympy.Symbol("i", real=True), sympy.I) if isinstance(parsed, sympy.Basic) else parsed


def _compare_expressions(answer: str, gold: str, tolerance: float | None) -> Verdict:
    """Numbers numerically, equations up to a factor, the rest by math-verify."""
    import sympy
    from math_verify import verify

    if "'" in answer + gold:
        return Verdict(False, "primes: only the same text is equal")  # as the parser drops them
    a, g = _parse(answer), _parse(gold)
    if a is None or g is None:
        return Verdict(False, "cannot be read as mathematics: only the same text is equal")
    if any(isinstance(x, sympy.Basic) and x.has(sympy.zoo, sympy.nan) for x in (a, g)):
        return Verdict(False, "a division by zero")
    if a == g:
        return Verdict(True, "same expression")
    for expression in (a, g):
        _size(expression)
    if isinstance(a, sympy.Eq) and isinstance(g, sympy.Eq):
        ratio = sympy.simplify((a.lhs - a.rhs) / (g.lhs - g.rhs))
        return Verdict(bool(ratio.is_number and ratio.is_finite and ratio != 0), "equations, up to a factor")
    if all(isinstance(x, sympy.Expr) and not x.free_symbols for x in (a, g)):
        return _compare_values(a, g, _decimals(answer), _decimals(gold), tolerance)
    return Verdict(bool(verify(g, a, timeout_seconds=None, allow_set_relation_comp=True)), "math-verify")


def _compare_values(a, g, digits: int | None, gold_digits: int | None, tolerance: float | None) -> Verdict:
    """Two sympy expressions without variables: exactly if rational, else to twelve digits."""
    a, g = a.doit(), g.doit()
    if tolerance is not None:
        return Verdict(bool(abs((a - g).evalf(30)) <= tolerance), f"numbers, within {tolerance}")
    if a.is_Rational and g.is_Rational:
        return Verdict(bool(a == g), "numbers")
    x, y = a.evalf(30), g.evalf(30)
    if not (abs(x) + abs(y)).is_finite:
        return Verdict(False, "no numbers")
    if _is_rounded(x, y, digits, gold_digits):
        return Verdict(True, "decimal of at least six digits")
    return Verdict(bool(abs(x - y) <= abs(y) * 1e-12), "numbers, to twelve digits")


def _size(expression) -> Decimal:
    """A bound on the size of an expression's values, to refuse `9^{9^{9}}` before it is computed.

    Raises:
        Overflow: more than 20,000 digits, or 3,000 with variables (each counts as 10).
    """
    digits = 3_000 if getattr(expression, "free_symbols", None) else 20_000  # powers of sums are expanded
    context = Context(prec=9, Emax=digits, traps=[Overflow])
    parts = [_size(part) for part in expression.args]
    name = type(expression).__name__
    if name in ("Sum", "Product"):  # over the second part: (k, first, last)
        return context.power(Decimal(10), parts[1])
    if name == "Pow":
        return context.power(max(parts[0], Decimal(10)), parts[1])
    if name == "factorial":
        return context.power(max(parts[0], Decimal(10)), parts[0])
    if name == "binomial":
        return context.power(max(parts[0], Decimal(10)), min(parts[1], abs(parts[0] - parts[1])))
    if not parts:
        is_number = getattr(expression, "is_Number", False) and expression.is_finite
        return abs(context.create_decimal(str(expression.evalf(9)))) if is_number else Decimal(10)
    result = parts[0]
    for part in parts[1:]:
        result = context.multiply(result, part) if name == "Mul" else context.add(result, part)
    return result


# ------------------------------------------------------------------- judging, in worker processes


def is_equivalent(answer: str, gold: str, seconds: float = SECONDS, tolerance: float | None = None) -> bool:
    """Whether an answer, LaTeX without the box around it, means the same as the gold one.

    Args:
        seconds: limit of processor time for the comparison. An answer that exceeds it is wrong, as
            is one that is empty, longer than MAX_CHARS, or makes the parser fail.
        tolerance: a number is right if it is no further from the gold one, absolutely
            (OlympiadBench's `error`); None: exact.

    Raises:
        ValueError: seconds is not positive.
        RuntimeError: no worker can start, for example because math-verify is missing.
    """
    return judge_all([(answer, gold, tolerance)], seconds)[0].equal


def judge_all(
    pairs: Sequence[tuple[str, str, float | None]], seconds: float = SECONDS, workers: int = 0
) -> list[Verdict]:
    """Verdicts on (answer, gold, tolerance) triples: equal ones once, hard ones in the workers.

    Args:
        workers: processes; 0: one per core that this process may use, its share under torchrun.
    """
    if seconds <= 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    quick = {pair: quick_verdict(*pair) for pair in pairs}
    cache = _cache(seconds)
    hard = [pair for pair, verdict in quick.items() if verdict is None and pair not in cache]
    if hard:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        found = _pool().run([json.dumps([*pair, seconds]) for pair in hard], workers or share)
        cache |= dict(zip(hard, found, strict=True))
    verdicts = [quick[pair] or cache[pair] for pair in pairs]
    if len(cache) > 2**18:
        cache.clear()
    return verdicts


@functools.cache
def _cache(seconds: float) -> dict[tuple, Verdict]:
    """Verdicts of the workers: the rollouts of one group mostly give the same few answers."""
    return {}


@dataclass
class Worker:
    """One process that compares; it speaks JSON lines over pipes, one task at a time."""

    process: subprocess.Popen
    ready: bool = False  # it has said so, thus what ends it now is a task
    task: int | None = None


class Pool:
    """Workers, started on first use. They end at exit, and with their standard input in any case."""

    def __init__(self) -> None:
        self.idle: list[Worker] = []
        self.busy: list[Worker] = []

    def run(self, tasks: list[str], workers: int) -> list[Verdict]:
        """Verdicts on the tasks, by at most so many workers; a hostile task holds up only its own.

        A worker that dies of anything but the time limit may have been dead or dying before (the
        kernel was short of memory, someone killed it), so its task is tried once more.
        """
        verdicts: list[Verdict | None] = [None] * len(tasks)
        todo = deque(enumerate(tasks))
        retried = set()
        try:
            while todo or self.busy:
                # Give every free worker a task.
                while todo and len(self.busy) < workers:
                    self._give(*todo.popleft())

                # Take what has come back: an answer, a sign of readiness, or an end of file.
                for worker in self._answered():
                    line = worker.process.stdout.readline()
                    if line == "ready\n":
                        worker.ready = True
                        continue
                    self.busy.remove(worker)
                    if not line and not worker.ready:
                        _end(worker)
                        command = " ".join(worker.process.args)
                        raise RuntimeError(f"no grading worker; for the reason run: {command}")
                    if not line:
                        _end(worker)
                    else:
                        self.idle.append(worker)
                    reply = json.loads(line) if line else None
                    if reply is None and worker.task not in retried:
                        retried.add(worker.task)
                        todo.append((worker.task, tasks[worker.task]))
                    else:
                        verdicts[worker.task] = Verdict(*(reply or (False, "the worker died twice")))
        except BaseException:  # Ctrl-C: the next task must not read the reply to this one
            self.close()
            raise
        return verdicts

    def close(self) -> None:
        """End all processes."""
        while self.idle or self.busy:
            _end((self.idle or self.busy).pop())

    def _give(self, number: int, task: str) -> None:
        worker = self.idle.pop() if self.idle else _start()
        worker.task = number
        self.busy.append(worker)
        with contextlib.suppress(BrokenPipeError):  # a dead worker shows when its reply is read
            worker.process.stdin.write(task + "\n")
            worker.process.stdin.flush()

    def _answered(self) -> list[Worker]:
        """Those of the busy workers that have something to read; waits for one."""
        with selectors.DefaultSelector() as selector:
            for worker in self.busy:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            return [key.data for key, _ in selector.select()]


def _start() -> Worker:
    command = [sys.executable, "-m", "plumbing.answers"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    root = Path(__file__).resolve().parents[1]
    return Worker(subprocess.Popen(command, cwd=root, **pipes, text=True, start_new_session=True))


def _end(worker: Worker) -> None:
    with contextlib.suppress(ProcessLookupError):  # the process and the child that compares
        os.killpg(worker.process.pid, signal.SIGKILL)
    for stream in (worker.process.stdin, worker.process.stdout):
        with contextlib.suppress(BrokenPipeError):  # the last task may still be in the buffer
            stream.close()
    worker.process.wait()


@functools.cache
def _pool() -> Pool:
    """The workers of this process."""
    pool = Pool()
    atexit.register(pool.close)
    return pool


def _serve() -> None:
    """Body of a worker: load sympy once, then compare in a child, and in the next when that dies."""
    import resource

    hard_limit = resource.getrlimit(resource.RLIMIT_DATA)[1]
    with contextlib.suppress(ValueError):  # the limit in force is already lower
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, hard_limit))
    # Their default action ends the process without asking Python, hence also within C.
    for alarm in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(alarm, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {alarm})
    signal.setitimer(signal.ITIMER_REAL, START_SECONDS)
    # A library that prints must not break the protocol.
    replies, sys.stdout = sys.stdout, sys.stderr
    logging.disable()
    compare("x^{2}", r"x\cdot x")  # loads the grammar and sympy, so that no task pays for it
    signal.setitimer(signal.ITIMER_REAL, 0)
    print("ready", file=replies, flush=True)
    while True:
        child = os.fork()
        if child == 0:
            _serve_tasks(replies)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            return
        late = os.WTERMSIG(status) == signal.SIGPROF
        print(json.dumps((False, "time limit") if late else None), file=replies, flush=True)


def _serve_tasks(replies) -> None:
    """Answer tasks from standard input until it closes, or until the kernel ends the process."""
    for line in sys.stdin:
        answer, gold, tolerance, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            verdict = compare(*_normal_forms(answer, gold), tolerance)
        except Exception as error:  # noqa: BLE001  whatever an answer provokes, it is not a right answer
            too_large = isinstance(error, Overflow)
            verdict = False, "too large to compute" if too_large else f"no verdict ({type(error).__name__})"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), file=replies, flush=True)


# ---------------------------------------------------------------------------- explaining a file


class Case(NamedTuple):
    """An answer to be judged."""

    answer: str | None  # None: the text has no closed box
    gold: str
    tolerance: float | None


def explain_file(path: str) -> None:
    """Grade a JSON Lines file of responses and print why each is right or wrong.

    Raises:
        InputError: a record without a text or a gold answer; the message names file and line.
    """
    from plumbing.common import InputError, printable, read_records  # all else here is of this file alone

    # The answer in every text.
    cases = []
    for where, record in read_records(path):
        texts = [record[name] for name in ("text", "response") if name in record]
        golds = [record[name] for name in ("gold", "ground_truth_answer", "answer") if name in record]
        if not texts or not golds:
            raise InputError(f"{where}: expected an object with `text` or `response`, and `gold` or `answer`")
        if not isinstance(texts[0], str) or not _gold_text(golds[0]):
            raise InputError(f"{where}: expected texts in `text` (or `response`) and `gold` (or `answer`)")
        try:
            tolerance = tolerance_of(record.get("tolerance"))
        except ValueError:
            found = record["tolerance"]
            raise InputError(f"{where}: `tolerance` is {found!r}, expected a number of 0 or more") from None
        cases.append(Case(extract_answer(texts[0]), _gold_text(golds[0]), tolerance))

    # No box is judged as an empty answer.
    verdicts = judge_all([(case.answer or "", case.gold, case.tolerance) for case in cases])
    for number, (case, verdict) in enumerate(zip(cases, verdicts, strict=True), start=1):
        print(f"{number} {'right' if verdict.equal else 'wrong'}: {printable(verdict.why)}")
        for name, text in (("answer", case.answer), ("gold", case.gold)):
            form = "no closed box"
            if text is not None:
                form = f"{text!r}, normal form {normal_form(text[:MAX_CHARS])!r}"
            print(f"  {name} {form}")
    print(f"{sum(verdict.equal for verdict in verdicts)} of {len(verdicts)} right")


if __name__ == "__main__":
    _serve()
