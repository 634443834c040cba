r"""How many answers a second does batch grading decide, do hostile ones hold it up, and is it right?

    python benchmarks/grading.py                                        # as many workers as cores
    python benchmarks/grading.py --workers 2 --questions 250 --samples 16
    python benchmarks/grading.py --golds data/hub                       # is it right? nothing is timed

A batch is what a rollout step brings: `samples` responses to each of `questions` questions. Three in
four questions have a number for an answer, the others an expression, a tuple, a set, an interval, a
matrix or a quantity with its unit. Of the responses to one question about half are right, in several
spellings; the wrong ones are drawn from a few, as models err alike. Measured, in one run on one
machine, workers started beforehand, every batch of its own questions:

    answers per second of `extract_answer` and `judge_all`, which is what `reward.grade` does with texts,
    with all workers and with one, without and with hostile answers (4 in 1,000, no two alike; some are
    refused at a glance, some cost the whole time limit)
    the share of answers that no worker had to see

With --golds, gold answers of the benchmarks in that folder are restated in the ways of RIGHT, which a careful
teacher accepts, and spoilt in the ways of WRONG; printed is how many of each are misjudged.
"""

from __future__ import annotations

import os
import random
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plumbing.answers import extract_answer, judge_all, normal_form, quick_verdict
from plumbing.common import InputError, run_script
from plumbing.config import Parser
from reward import read_questions

# ------------------------------------------------------------------------------------------ speed


def question(rng: random.Random) -> tuple[str, list[str], list[str]]:
    """A gold answer, spellings of it, and wrong answers."""
    a, b, c = rng.randint(2, 999), rng.randint(2, 99), rng.randint(2, 9)
    if rng.random() < 0.75:
        kinds = [
            (f"{a}", [f"{a}", f"${a}$", f"{a}.0", f"x={a}"], [f"{a + c}", f"{b}", f"-{a}"]),
            (rf"\frac{{{a}}}{{{b}}}", [f"{a}/{b}", rf"\dfrac{{{a}}}{{{b}}}"], [f"{b}/{a}", f"{c}"]),
            (f"{a * 1000}", [f"{a},000", rf"{a}{{,}}000"], [f"{a}", f"{a}0,000"]),
        ]
    else:
        kinds = [
            (
                rf"{c}\sqrt{{{b}}}",
                [rf"\sqrt{{{c * c * b}}}", rf"{c} \sqrt {{{b}}}"],
                [f"{c * b}"],
            ),
            (f"x^2+{b}x+{a}", [f"{a}+x^2+{b}x", f"x(x+{b})+{a}"], [f"x^2-{b}x+{a}", f"x^2+{a}x+{b}"]),
            (f"({a},{b})", [rf"\left({a}, {b}\right)"], [f"({b},{a})", f"({a},{c})"]),
            (f"{a}, {b}", [f"{b}, {a}", rf"\{{{a}, {b}\}}"], [f"{a}", f"{a}, {c + b}"]),
            (rf"(-\infty,{b}]", [rf"(-\infty, {b}]"], [rf"(-\infty,{b})"]),
            (
                rf"\begin{{pmatrix}} {a} \\ {b} \end{{pmatrix}}",
                [rf"\begin{{bmatrix}}{a}\\{b}\end{{bmatrix}}"],
                [rf"\begin{{pmatrix}}{b}\\{a}\end{{pmatrix}}"],
            ),
            (rf"{b} \text{{ km}}", [f"{b}", f"{b} km", rf"{b * 1000} \text{{ m}}"], [f"{b} miles", f"{a}"]),
        ]
    return rng.choice(kinds)


def hostile(number: int) -> str:
    """An answer that sympy would work on for long, or for ever."""
    forms = [
        f"(x+y+z+w+{number})^{{100}}",  # the whole time limit; the others are refused sooner
        rf"\prod_{{k=1}}^{{10^8}} (k+{number})",
        f"(x+{number})^{{10000}}",
        "(" * 900 + f"{number}" + ")" * 900,
        rf"{number}^{{9^{{9^{{9}}}}}}",
    ]
    return forms[number % len(forms)]


def make_batch(seed: int, questions: int, samples: int, share: float) -> tuple[list[str], list[str]]:
    """Responses and their gold answers, in random order."""
    rng, pairs = random.Random(seed), []
    for _ in range(questions):
        gold, right, wrong = question(rng)
        for _ in range(samples):
            pairs.append((rng.choice(right if rng.random() < 0.5 else wrong), gold))
    for number in range(round(len(pairs) * share)):
        place = rng.randrange(len(pairs))
        pairs[place] = hostile(5 * seed + number + 5), pairs[place][1]
    rng.shuffle(pairs)
    texts = [f"We first note that 1+1=2. Hence the answer is $\\boxed{{{answer}}}$." for answer, _ in pairs]
    return texts, [gold for _, gold in pairs]


def rate(texts: list[str], golds: list[str], workers: int) -> float:
    """Answers per second of one batch."""
    start = time.perf_counter()
    pairs = [(extract_answer(text), gold, None) for text, gold in zip(texts, golds, strict=True)]
    judge_all(pairs, workers=workers)
    return len(texts) / (time.perf_counter() - start)


# --------------------------------------------------------------------------------- right or wrong

# Per class, ways to write it: `answer ~ gold`, separated by `;;`. <...> stand for golds of the benchmarks:
# see `fillings`; a name that ends in 1 is that number plus 1, and 2*<p> is reckoned out.
RIGHT = r"""
unit in text: <value>\text{ units} ~ <value> ;; <a> units ~ <a> ;; <a>\text{ unit} ~ <a>
square unit: <a> square units ~ <a> ;; <value>\text{ square units} ~ <value> ;;
    <value>\text{ units}^2 ~ <value> ;; <a> sq. units ~ <a>
upright unit: <a>\ \mathrm{cm^2} ~ <a> ;; <value>\ \mathrm{cm}^2 ~ <value> ;;
    <value>\,\mathrm{cm^3} ~ <value>
unit converted: <a> km ~ <a>000\text{ m} ;; <a>\text{ hours} ~ <a>*60 minutes
money: \$<a> ~ <a> ;; $<a>$ ~ <a> ;; <a>\text{ dollars} ~ \$<a> ;; \$<a>.00 ~ <a>
plus-minus: \pm<a> ~ <a>,-<a> ;; x=\pm<a> ~ -<a>,<a> ;; \pm <value> ~ <value>,-<value> ;;
    <a>\pm\sqrt<d> ~ <a>+\sqrt{<d>},<a>-\sqrt{<d>} ;; ±<a> ~ -<a>, <a>
plus-minus in a tuple: (0,\pm<a>) ~ (0,<a>),(0,-<a>) ;; (\pm<a>,<b>) ~ (-<a>,<b>),(<a>,<b>)
column as array: \left(\begin{array}{c}<a>\\<b>\\-<c>\end{array}\right) ~ <column> ;;
    \left[\begin{array}{r}<a>\\<b>\\-<c>\end{array}\right] ~ <column>
matrix in brackets: \left(\begin{matrix}<a>\\<b>\\-<c>\end{matrix}\right) ~ <column> ;;
    \begin{bmatrix}<a>\\<b>\\-<c>\end{bmatrix} ~ <column> ;;
    \left(\begin{smallmatrix}<a>\\<b>\\-<c>\end{smallmatrix}\right) ~ <column>
named matrix: \mathbf v=<column> ~ <column> ;; \mathbf{A}^{-1}=<square> ~ <square> ;;
    \vec{v} = <column> ~ <column> ;; M=<square> ~ <square>
factor before a matrix: -\begin{pmatrix}-<a>\\-<b>\\<c>\end{pmatrix} ~ <column> ;;
    \frac12\begin{pmatrix}2*<a>\\2*<b>\\-2*<c>\end{pmatrix} ~ <column> ;;
    <q>\begin{pmatrix}<p>/<q>\\1\end{pmatrix} ~ \begin{pmatrix}<p>\\<q>\end{pmatrix}
sum of matrices:
    \begin{pmatrix}<a>\\<b>\end{pmatrix}+\begin{pmatrix}1\\0\end{pmatrix} ~
    \begin{pmatrix}<a1>\\<b>\end{pmatrix}
space between rows: \begin{pmatrix}<a>\\[4pt]<b>\\[4pt]-<c>\end{pmatrix} ~ <column> ;;
    \begin{pmatrix} <a> \\[1ex] <b> \\[1ex] -<c> \\ \end{pmatrix} ~ <column>
length or measure: |AB|=<value> ~ <value> ;; \overline{AB} = <value> ~ <value> ;;
    m\angle A = <a>^\circ ~ <a>^\circ ;; AB = <value> ~ <value> ;; [ABC]=<value> ~ <value> ;;
    \|\mathbf{v}\| = <value> ~ <value>
function of a letter: \sin A=<value> ~ <value> ;; \cos\theta = <value> ~ <value> ;;
    \tan(x+y)=<value> ~ <value> ;; \log_2 x=<value> ~ <value> ;; P(A|B) = <value> ~ <value> ;;
    a_{10}=<value> ~ <value>
named function: f^{-1}(x)=<expression> ~ <expression> ;; f(x)=<expression> ~ <expression> ;;
    \operatorname{proj}_v(w)=<expression> ~ <expression> ;; S_n=<expression> ~ <expression> ;;
    P(n)=<expression> ~ <expression>
named tuple: (r,\theta)=(<a>,\pi/2) ~ \left(<a>,\frac{\pi}{2}\right) ;; (x, y) = <pair> ~ <pair> ;;
    A=<pair> ~ <pair> ;; (\rho,\theta,\phi)=(<a>,\pi,<b>) ~ (<a>,\pi,<b>)
name in words: \text{proj}_{\mathbf{w}}\mathbf{v}=<column> ~ <column> ;; \text{Area}=<value> ~ <value> ;;
    \text{Total cost} = \$<a> ~ <a>
sum of unknowns: m+n=<a> ~ <a> ;; x+y=<value> ~ <value> ;; \frac{a}{b} = <value> ~ <value>
chain: x=<a>+1=<a1> ~ <a1> ;; \sin A=\frac{2*<p>}{2*<q>}=<fraction> ~ <fraction> ;;
    |AB|=<a>-<b>+<b>=<a> ~ <a> ;; \frac{2*<p>}{2*<q>}=<fraction> ~ <fraction>
sum with unit: <a> + <b> = <s> units ~ <s> ;; <a>+1=<a1>\text{ apples} ~ <a1> ;; <a> + 1 = \$<a1> ~ <a1>
relation in ASCII: x >= <a> ~ x \ge <a> ;; x <= <value> ~ x \leq <value> ;; x != <a> ~ x \ne <a> ;;
    x>=<a> ~ [<a>,\infty) ;; k >= <a> ~ $k \geqslant <a>$
inequalities for a union: x<-<a> \text{ or } x><b> ~ (-\infty,-<a>)\cup(<b>,\infty) ;;
    x \le -<a> \text{ or } x \ge <b> ~ (-\infty,-<a>]\cup[<b>,\infty) ;;
    -<a> < x < 0 \text{ or } x > <b> ~ (-<a>,0)\cup(<b>,\infty)
inequality for an interval: -<a> < x < <b> ~ (-<a>,<b>) ;; -<a> \le x < <b> ~ [-<a>,<b>) ;;
    x \in (-<a>,<b>] ~ (-<a>,<b>] ;; x < <a> ~ (-\infty,<a>)
complex: \frac{<p>i}{<q>} ~ \frac{<p>}{<q>} i ;; <a>+\frac{i}{2} ~ \frac12 i+<a> ;;
    \frac{<a>+<b>i}{2} ~ \frac{<a>}{2}+\frac{<b>}{2}i ;; <b>i+<a> ~ <a>+<b>i
Unicode fraction: ½ ~ \frac12 ;; <a>½ ~ <a>.5 ;; <a> ¾ ~ <a>.75 ;; ⅔ ~ \frac{2}{3}
Unicode root: √<d> ~ \sqrt{<d>} ;; <a>√<d> ~ <a>\sqrt{<d>} ;; √(<d>)/2 ~ \frac{\sqrt{<d>}}{2}
Unicode power: <a>x² ~ <a>x^2 ;; x³+<a>x² ~ x^3+<a>x^2 ;; 10³ ~ 1000 ;; 10⁻² ~ 0.01 ;; x¹⁰ ~ x^{10} ;;
    <a>×10³ ~ <a>000
Unicode signs: <a>π ~ <a>\pi ;; <a>° ~ <a>^\circ ;; −<a> ~ -<a> ;; x ≥ <a> ~ x\ge <a> ;;
    (−∞,<a>) ~ (-\infty,<a>) ;; 2·<a> ~ 2*<a>
repeating decimal: 0.\overline{3} ~ \frac13 ;; <a>.\overline{6} ~ <a>\frac23 ;;
    0.1\overline{6} ~ \frac16 ;; 0.\overline{<n>} ~ \frac{<n>}{99}
thousands: <n>,<h> ~ <n><h> ;; <n>{,}<h> ~ <n><h> ;; <n>\,<h> ~ <n><h> ;; <n><h> ~ <n>,\!<h> ;;
    \frac{<n>,<h>}{\pi} ~ \frac{<n><h>}{\pi} ;; \frac{\pi}{<n>,<h>} ~ \frac{\pi}{<n><h>}
millions: <a> million ~ <a>000000 ;; <n>\text{ million} ~ <n>,000,000 ;; \$<a> million ~ <a>000000 ;;
    <n>.5 million ~ <n>500000 ;; <a>\text{ thousand} ~ <a>000 ;; <a> billion ~ <a>000000000
fraction: <p>/<q> ~ <fraction> ;; \dfrac{<p>}{<q>} ~ <fraction> ;; \frac{2*<p>}{2*<q>} ~ <fraction> ;;
    \frac{-<p>}{<q>} ~ -<fraction> ;; <p>\cdot\frac{1}{<q>} ~ <fraction>
mixed number: <a>\frac{1}{<b>} ~ <a>+\frac{1}{<b>} ;; <a> 1/2 ~ <a>.5 ;; <a> \frac34 ~ <a>.75
decimal: <a>.0 ~ <a> ;; <a>.50 ~ <a>\frac12 ;; <a>. ~ <a> ;; +<a> ~ <a> ;; 0<a> ~ <a>
root: \sqrt{4*<d>} ~ 2\sqrt{<d>} ;; <a>\cdot\sqrt{<d>} ~ <a>\sqrt{<d>} ;; sqrt(<d>) ~ \sqrt{<d>} ;;
    <d>^{1/2} ~ \sqrt{<d>} ;; \frac{<d>}{\sqrt{<d>}} ~ \sqrt{<d>}
multiple of pi: \frac{<a>\pi}{<b>} ~ \frac{<a>}{<b>}\pi ;; <a>pi ~ <a>\pi ;; \pi\cdot<a> ~ <a>\pi
list: <b>, <a> ~ <a>,<b> ;; <a>\text{ and }<b> ~ <a>,<b> ;; \{<b>,<a>\} ~ <a>,<b> ;;
    x=<a> or x=<b> ~ <a>,<b> ;; <a>; <b> ~ $<b>$,$<a>$ ;; x_1=<a>, x_2=<b> ~ <b>, <a>
tuple: \left(<a>, <b>\right) ~ (<a>,<b>) ;; <a>,<b> ~ (<a>,<b>) ;; x=<a>,y=<b> ~ (<a>,<b>) ;;
    ( <a> , <b> ) ~ (<a>,<b>) ;; x=<a>\text{ and }y=<b> ~ (<a>,<b>)
interval: \left[-<a>,<b>\right) ~ [-<a>,<b>) ;; (-<a>, inf) ~ (-<a>,\infty) ;;
    (<b>,+\infty)\cup(-\infty,-<a>) ~ (-\infty,-<a>)\cup(<b>,\infty)
percent: <a>\% ~ <a> ;; <a>% ~ <a>\% ;; <a> percent ~ <a>\% ;; 0.5 ~ 50\%
degrees: <a> ~ <a>^\circ ;; <a>^{\circ} ~ <a> ;; <a> degrees ~ <a>^\circ ;; <a>\text{ degrees} ~ <a>
expression: <b>+<a>x ~ <a>x+<b> ;; x(x+<a>) ~ x^2+<a>x ;; \frac{x+<a>}{2} ~ \frac12 x+\frac{<a>}{2} ;;
    <a>*x**2 ~ <a>x^2 ;; (x+<a>)(x-<a>) ~ x^2-<a>^2
equation: y=<a>x+<b> ~ <a>x-y+<b>=0 ;; <a>x+<b>=y ~ y=<a>x+<b> ;; 2y=2*<a>x ~ y=<a>x ;;
    y = <a>x + <b> ~ <a>x+<b>
words: \text{<word>} ~ <word> ;; <word>. ~ \text{<word>} ;; \textbf{<word>} ~ <word> ;; (C) ~ \text{C}
any gold in dress: $<gold>$ ~ <gold> ;; \(<gold>\) ~ <gold> ;; \displaystyle <gold> ~ <gold> ;;
    \boxed{<gold>} ~ <gold> ;;  <gold> . ~ <gold>
any gold respaced: <respaced> ~ <gold>
ratio: <a>:<b> ~ <a> : <b> ;; <a>\colon <b> ~ <a>:<b> ;; <p>:<q> ~ <fraction>
base: <n>_{9} ~ <n>_9 ;; <n> ~ <n>_9 ;; <n>_{\text{9}} ~ <n>_9
power of ten: <n>\times 10^{3} ~ <n>000 ;; <n>\cdot10^3 ~ <n>,000 ;; 10^{-2} ~ 0.01
published oddly: (0,<a>] ~ $t(0,<a>]$ ;; t\in(0,<a>] ~ $t(0,<a>]$ ;; <n>, 8 ~ $<n>,$8$ ;;
    f(x)=ax+b ~ $f(x)=a x+b$, where $b$ is an arbitrary integer, and $a>0$ ;;
    f(x)=ax+b, \text{ where } a>0 ~ $f(x)=a x+b$, where $b$ is any integer, and $a>0$ ;;
    <a>^\circ,<a>^\circ ~ $\angle B E A_{1}=<a>$,$\angle A E B_{1}=<a>$ ^{\circ}
"""
WRONG = r"""
unit in text: <a1>\text{ units} ~ <a> ;; <other>\text{ units} ~ <value>
square unit: <a1> square units ~ <a> ;; <a>\text{ cm}^2 ~ <a>\text{ cm} ;;
    <other>\text{ units}^2 ~ <value> ;; <a>^2\text{ units} ~ <a>
upright unit: <a>\ \mathrm{cm^2} ~ <a>\text{ cm}^3 ;; <a1>\ \mathrm{cm^2} ~ <a>
unit converted: <a> km ~ <a>\text{ m} ;; <a> hours ~ <a> minutes ;; \$<a> ~ <a>\text{ cents}
plus-minus: \pm<a> ~ <a> ;; \pm<a1> ~ <a>,-<a> ;; <a> ~ <a>,-<a> ;; \pm<a> ~ <a>,-<a>,0 ;;
    <a>\pm\sqrt<d> ~ -<a>+\sqrt{<d>},<a>-\sqrt{<d>}
plus-minus in a tuple: (0,\pm<a>) ~ (0,<a>) ;; (\pm<a>,0) ~ (0,<a>),(0,-<a>)
column as array: \left(\begin{array}{c}<b1>\\<a>\\-<c>\end{array}\right) ~ <column> ;;
    \left(\begin{array}{ccc}<a>&<b>&-<c>\end{array}\right) ~ <column>
named matrix: \mathbf v=\begin{pmatrix}<a>\\<b1>\\-<c>\end{pmatrix} ~ <column> ;; M=<a> ~ <square> ;;
    M=\begin{pmatrix}<a>&<c1>\\<b>&1\end{pmatrix} ~ <square>
factor before a matrix: -<column> ~ <column> ;; 2<column> ~ <column> ;; \frac12<square> ~ <square> ;;
    -\begin{pmatrix}-<a>\\<b>\\<c>\end{pmatrix} ~ <column>
sum of matrices: <column>+<column> ~ <column> ;; <column>-<column> ~ <column> ;; <column>+1 ~ <column> ;;
    <column><column> ~ <column>
length or measure: |AB|=<other> ~ <value> ;; AB=<a1> ~ <a> ;; |AB|=<other> ~ |AB|=<value>
function of a letter: \sin A=<other> ~ <value> ;; \cos A=<a1> ~ <a> ;; x_1=<a1> ~ <a>
named function: f^{-1}(x)=<expression>+1 ~ <expression> ;; g(x)=<a>x ~ f(x)=<a>x ;;
    f(x)=<expression>+1 ~ f(x)=<expression>
named tuple: (r,\theta)=(<a1>,\pi/2) ~ \left(<a>,\frac{\pi}{2}\right) ;; (x,y)=(<b1>,<a>) ~ (<a>,<b>) ;;
    (y,x)=(<a>,<b1>) ~ (<a>,<b>)
name in words: \text{Area}=<other> ~ <value> ;; \text{Area}=<a1> ~ <a>
equation for a value: <a>x-y=0 ~ 0 ;; 2x=<a> ~ x=<a> ;; x+y=<a1> ~ <a> ;; x=<a> ~ y=<a> ;;
    x^2=<a> ~ x=<a>
chain: x=<a>=<a1> ~ <a> ;; x=\frac{2*<p>}{2*<q>}=\frac{<p1>}{<q>} ~ <fraction>
sum with unit: <a> + <b> = <s1> units ~ <s> ;; <a>+1=<a1>\text{ apples} ~ <a>
relation in ASCII: x >= <a> ~ x > <a> ;; x <= <a> ~ x \ge <a> ;; x != <a> ~ x = <a> ;;
    x = <a> ~ x \ne <a> ;; x>=<a> ~ (<a>,\infty) ;; x >= <a> ~ <a>
inequalities for a union: x \le -<a> \text{ or } x><b> ~ (-\infty,-<a>)\cup(<b>,\infty) ;;
    x<-<a1> \text{ or } x><b> ~ (-\infty,-<a>)\cup(<b>,\infty) ;;
    x>-<a> \text{ or } x<<b> ~ (-\infty,-<a>)\cup(<b>,\infty) ;; x><b> ~ (-\infty,-<a>)\cup(<b>,\infty)
inequality for an interval: -<a> \le x < <b> ~ (-<a>,<b>) ;; -<a> < x < <b1> ~ (-<a>,<b>) ;;
    x > <a> ~ (-\infty,<a>)
complex: \frac{<p1>i}{<q>} ~ \frac{<p>}{<q>} i ;; <a>-<b>i ~ <a>+<b>i ;;
    \frac{<p>}{<q>} ~ \frac{<p>}{<q>} i
Unicode fraction: <a>½ ~ \frac{<a>}{2} ;; <a>½ ~ <a> ;; ½ ~ \frac13 ;; <a>¼ ~ <a>.75
Unicode root: √<d> ~ <d> ;; <a>√<d> ~ \sqrt{<d>} ;; √<d> ~ \sqrt{<d1>}
Unicode power: <a>x² ~ <a>x^3 ;; <a>x² ~ <a>x ;; 10³ ~ 103 ;; <a>² ~ <a>2 ;; x₂ ~ x^2
repeating decimal: 0.\overline{3} ~ 0.3 ;; 0.\overline{<n>} ~ 0.<n> ;; <a>.\overline{6} ~ <a>\frac35
thousands: <n>,<h> ~ <n> ;; <n>,<h> ~ <n>.<h> ;; \frac{<n>,<h>}{\pi} ~ \frac{<n>}{\pi}
millions: <a> million ~ <a> ;; <a> ~ <a> million ;; <a> million ~ <a> billion ;;
    <a>\text{ thousand} ~ <a> ;; <a> million ~ <a>000
side by side: 1 <n> ~ 1<n> ;; <a> 1/2 ~ <a>1/2 ;; <a> <b> ~ <a>*<b> ;; <a>1/2 ~ <a>\frac12 ;;
    1 <a> ~ <a>
clock and ratio: 6:<t> ~ 7:<t> ;; 1:00 ~ 12:00 ;; <a>:<b> ~ <b>:<a1> ;; <a>:<b> ~ <a> ;; <a>:<b> ~ <b>
division by zero: \frac{<n1>}0 ~ \frac{<n>}0 ;; <a>/0 ~ 0 ;; \frac{<a>}{0} ~ \infty ;;
    \tan 90^\circ ~ \frac10
letter case: <a>r^2 ~ <a>R^2 ;; <a>A ~ <a>a ;; <a>x+Y ~ <a>x+y ;; N-<a> ~ n-<a> ;;
    \frac{n}{<a>} ~ \frac{N}{<a>}
prime: <a>' ~ <a> ;; <a>x' ~ <a>x ;; f'(x)=<a>x ~ f(x)=<a>x ;; <a>'' ~ <a> ;; y' ~ y
fraction: <q1>/<p> ~ <fraction> ;; \frac{<p1>}{<q>} ~ <fraction> ;; -<fraction> ~ <fraction>
mixed number: <a>\frac{1}{<b>} ~ \frac{<a>}{<b>} ;; <a> 1/2 ~ <a1>.5
decimal: <a>.1 ~ <a> ;; 0.33 ~ \frac13 ;; -<a> ~ <a> ;; <a>0 ~ <a>
root: \sqrt{2*<d>} ~ 2\sqrt{<d>} ;; \sqrt[3]{<d>} ~ \sqrt{<d>} ;; <d> ~ \sqrt{<d>}
multiple of pi: <a> ~ <a>\pi ;; <a1>\pi ~ <a>\pi ;; <a>\pi^2 ~ <a>\pi ;; 3.14 ~ \pi
list: <a>, <b1> ~ <a>,<b> ;; <a> ~ <a>,<b> ;; <a>,<b>,<c> ~ <a>,<b> ;; <a>,<a> ~ <a>,<b>
tuple: (<b>,<a>) ~ (<a>,<b>) ;; (<a>,<b>,0) ~ (<a>,<b>) ;; [<a>,<b>) ~ (<a>,<b>)
interval: (-<a>,<b>) ~ [-<a>,<b>) ;; (-\infty,<b>)\cup(<b>,\infty) ~ (-\infty,\infty) ;;
    [-<a>,\infty) ~ (-\infty,<a>]
percent: <a1>\% ~ <a> ;; <a>\% ~ <a>^\circ ;; 0.<a>% ~ <a>%
degrees: <a1> ~ <a>^\circ ;; <a>0^\circ ~ <a>^\circ ;; <a>^\circ ~ <a>\text{ cm}
expression: <a>x-<b> ~ <a>x+<b> ;; <a>x^2 ~ <a>x^3 ;; <a>y ~ <a>x ;; <expression>+1 ~ <expression> ;;
    x^{1}<a> ~ x^{1<a>}
equation: y=<a>x+<b1> ~ y=<a>x+<b> ;; y=<a1>x ~ <a>x-y=0 ;; x=<a>y ~ y=<a>x
words: \text{not <word>} ~ <word> ;; \text{<word>} ~ Nobody ;; (C) ~ (D) ;; <a> ~ <word>
another gold: <foreign> ~ <gold>
base: <n>_8 ~ <n>_9 ;; <n1>_9 ~ <n>_9
power of ten: <n>\times 10^{3} ~ <n>0000 ;; <n>\cdot10^{-3} ~ <n>000 ;; 10^{-2} ~ 100
published oddly: [0,<a>] ~ $t(0,<a>]$ ;; (0,<a1>] ~ $t(0,<a>]$ ;; <n>8 ~ $<n>,$8$ ;;
    f(x)=ax-b ~ $f(x)=a x+b$, where $b$ is any integer ;; <n> ~ $<n>,$8$
"""


def classes(table: str) -> dict[str, list[list[str]]]:
    """A table as lists of [answer, gold] by the name of the class."""
    result = {}
    for line in table.strip().replace("\n    ", " ").splitlines():
        name, _, pairs = line.partition(": ")
        result[name] = [pair.strip().split(" ~ ") for pair in pairs.split(";;")]
    return result


def read_golds(folder: str) -> dict[str, list[str]]:
    """Gold answers of all benchmarks in a folder, by kind, without dollars around them.

    Raises:
        InputError: fewer than three golds of some kind.
    """
    files = sorted(Path(folder).glob("*.jsonl"))
    golds = [q.gold.strip("$ ") for file in files for q in read_questions(str(file))]
    golds = sorted({normal_form(gold): gold for gold in golds}.values())
    patterns = {
        "whole": r"[2-9]|[1-9]\d{1,3}",
        "fraction": r"\\frac\{\d+\}\{\d+\}",
        "value": r"\d* ?(?:\\sqrt\{\d+\}|\\pi)|\\frac\{[\d ]*\\(?:pi|sqrt\{\d+\})\}\{\d+\}",
        "expression": r"[\d+\-^{}()/ ]*([nkx])(?:[\d+\-^{}()/ ]|\1)*",
        "pair": r"\(-?\d+, ?-?\d+\)",
        "word": r"\\text\{[A-Za-z]{3,}\}",
        "gold": r"[^$]*[^$.]",
    }
    kinds = {kind: [g for g in golds if re.fullmatch(p, g)] for kind, p in patterns.items()}
    kinds["word"] = [word[6:-1] for word in kinds["word"]]
    for kind, found in kinds.items():
        if len(found) < 3:
            raise InputError(f"{folder}: {len(found)} gold answers of the kind {kind}, expected 3 or more")
    return kinds


def fillings(kinds: dict[str, list[str]], seed: int, count: int) -> list[dict[str, str]]:
    """What stands for <a>, <value> and so on: golds drawn anew each time, and what is made of them."""
    rng, result = random.Random(seed), []
    for _ in range(count):
        # Golds, two of a kind where one is the wrong one.
        filling = {kind: rng.choice(found) for kind, found in kinds.items()}
        filling["value"], filling["other"] = rng.sample(kinds["value"], 2)
        filling["gold"], filling["foreign"] = rng.sample(kinds["gold"], 2)
        a, b, c = map(int, rng.sample(kinds["whole"], 3))
        p, q = map(int, re.findall(r"\d+", filling["fraction"]))

        # What is made of them, and a few numbers drawn at random: a root, two, three digits, minutes.
        filling["respaced"] = re.sub(r"([-+=<>|&]|\\cup|\\\\)", r" \1 ", filling["gold"])
        filling["column"] = rf"\begin{{pmatrix}} {a} \\ {b} \\ -{c} \end{{pmatrix}}"
        filling["square"] = rf"\begin{{pmatrix}} {a} & {b} \\ {c} & 1 \end{{pmatrix}}"
        filling |= {"h": f"{rng.randrange(1000):03}", "t": f"{rng.randrange(60):02}"}
        d, n = rng.choice([2, 3, 5, 6, 7]), rng.randrange(10, 98)
        for name, value in {"a": a, "b": b, "c": c, "d": d, "n": n, "p": p, "q": q, "s": a + b}.items():
            filling |= {name: str(value), name + "1": str(value + 1)}
        result.append(filling)
    return result


def fill(template: str, filling: dict[str, str]) -> str:
    """The template `x=2*<a>` with 5 for a: `x=10`."""
    text = re.sub("<([a-z]+1?)>", lambda m: filling[m[1]], template)
    return re.sub(r"(?<!\d)(\d+)\*(\d+)", lambda m: str(int(m[1]) * int(m[2])), text)


def measure_verdicts(folder: str, count: int, show: bool) -> None:
    """Print how many right answers are rejected and wrong ones accepted, by class and in all."""
    kinds = read_golds(folder)
    for table, expected, verb in ((RIGHT, True, "rejected"), (WRONG, False, "accepted")):
        print(f"| class | {verb} | of |\n|---|---:|---:|")
        all_errors = all_pairs = 0
        for number, (name, forms) in enumerate(classes(table).items()):
            filled = fillings(kinds, number, count)
            pairs = [[fill(text, f) for text in forms[i % len(forms)]] for i, f in enumerate(filled)]
            verdicts = judge_all([(answer, gold, None) for answer, gold in pairs])
            errors = [p for p, verdict in zip(pairs, verdicts, strict=True) if verdict.equal != expected]
            print(f"| {name} | {len(errors)} | {len(pairs)} |")
            for answer, gold in errors if show else []:
                print(f"    {answer}   for   {gold}")
            all_errors, all_pairs = all_errors + len(errors), all_pairs + len(pairs)
        print(f"| all {len(classes(table))} | {all_errors} ({all_errors / all_pairs:.1%}) | {all_pairs} |\n")


def main() -> None:
    """Print the figures."""
    parser = Parser(description="Measure batch grading.")
    parser.add_argument("--questions", type=int, default=250)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--golds", metavar="FOLDER", help="benchmarks: count misjudged answers")
    parser.add_argument("--each", type=int, default=50, help="answers per class, with --golds")
    parser.add_argument("--show", action="store_true", help="print the misjudged answers, with --golds")
    options = parser.parse_args()
    if options.golds:
        measure_verdicts(options.golds, options.each, options.show)
        return
    print(f"{options.questions} questions x {options.samples} answers, {options.workers} workers\n")
    warm = [(f"{i}x", f"x+{i}x", None) for i in range(4 * options.workers)]
    judge_all(warm, 60.0, options.workers)
    print("| batch | answers/s, all workers | one worker | ratio | decided without a worker |")
    print("|---|---|---|---|---|")
    for name, share in (("typical", 0.0), ("with 4 hostile in 1,000", 0.004)):
        measured = []
        for repeat in range(options.repeats):
            rates = []
            for workers in (options.workers, 1):
                seed = 2 * repeat + (workers > 1) + 1000 * (share > 0)
                texts, golds = make_batch(seed, options.questions, options.samples, share)
                rates.append(rate(texts, golds, workers))
            answers = [extract_answer(text) for text in texts]
            quick = sum(quick_verdict(a, g, None) is not None for a, g in zip(answers, golds, strict=True))
            measured.append((*rates, quick / len(texts)))
        fast, slow, quick = (sorted(column)[len(column) // 2] for column in zip(*measured, strict=True))
        print(f"| {name} | {fast:,.0f} | {slow:,.0f} | {fast / slow:.2f} | {quick:.0%} |")


if __name__ == "__main__":
    run_script(main)
