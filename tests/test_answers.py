r"""Answer checking against a hand-made table, the gold answers of benchmarks, and hostile answers.

The benchmarks are not part of this repository: their tests skip unless they are in data/hub, where
data/download.py puts them, or in the folder named by NANODIRL_BENCHMARKS.
"""

import os
import random
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plumbing.answers import is_equivalent, judge_all, normal_form, number
from reward import Question, Utf8, example, grade, read_questions

# (answer, gold) by category. Written by hand: what a careful teacher would say, not what the code does.
EQUAL = {
    "numbers": [
        ("18", "18"), (" 18 ", "18"), ("$18$", "18"), (r"\(18\)", "18"), ("18.0", "18"), ("18.", "18"),
        ("+18", "18"), ("−3", "-3.00"), ("070", "70"), ("25", "025"), (".5", "0.5"), ("3.210", "3.21"),
        ("0.333333", r"\frac13"), ("3.14159265", r"\pi"), (r"6.72 \times 10^{-5}", ".0000672"),
        ("2^{10}", "1024"), (r"2 \times 10^3", "2000"), ("5!", "120"), (r"\binom{5}{2}", "10"),
        (r"\log_2 8", "3"), (r"\boxed{2}", "2"), ("**42**", "42"), ("2 + 3 = 5", "5"),
        ("8 + 8 + 15 = 31 units", "31"), (r"4 + 3 = 7\text{ apples}", "7"), ("1 000 000", "1000000"),
    ],
    "thousands": [
        ("1,234", "1234"), ("1{,}234", "1234"), ("10080", r"10,\!080"), ("10,080", r"10,\!080"),
        ("1,234,567.50", "1234567.5"), (r"10\,000", "10000"), ("11,111,111,100", r"11,\! 111,\! 111,\! 100"),
        (r"\$32,348", r"\$32,\!348"), ("58500", "58,500"), ("1,000 and 2,000", "1000, 2000"),
        (r"\frac{20,000}{\pi}", r"\frac{20000}{\pi}"), (r"\sqrt{1,000}", r"\sqrt{1000}"),
        ("807, 200", "200,807"),
        ("107; 108", "$108$,$107$"), ("200,807", "(200, 807)"), (r"\pm324", "-324,324"),
    ],
    "fractions and mixed numbers": [
        ("0.5", r"\frac{1}{2}"), ("1/2", r"\frac{1}{2}"), (r"\dfrac{1}{2}", r"\frac12"),
        (r"\tfrac 34", r"\frac{3}{4}"),
        (r"\frac{2}{4}", r"\frac{1}{2}"), (r"-\frac{1}{2}", r"\frac{-1}{2}"), (r"\frac{1}{-2}", r"-\frac12"),
        (r"\frac{270}7", r"\frac{270}{7}"), (r"\frac9{19}", r"\dfrac{9}{19}"), (r"1\frac{4}{5}", r"\frac95"),
        ("1 4/5", "9/5"), (r"137 \frac{1}{2}", "137.5"), (r"-1\frac{1}{2}", "-1.5"), ("1.8", r"1\frac{4}{5}"),
        (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"), (r"\frac{-1}{1997}", r"-\frac{1}{1997}"),
        ("4/8", ".5"),
    ],
    "roots, constants, complex numbers": [
        (r"2\sqrt{2}", r"\sqrt{8}"), (r"11\sqrt{2}", r"11\sqrt2"), ("sqrt(2)", r"\sqrt2"), ("3pi", r"3\pi"),
        (r"3\pi", r"\pi \cdot 3"), (r"\sqrt[3]{8}", "2"), ("1+2i", "2i + 1"),
        (r"\sin(\pi/6)", r"\frac{1}{2}"),
        (r"5\sqrt[3]{4}", r"5 \cdot 4^{1/3}"), ("2.5\\pi", r"\frac{5\pi}{2}"), ("e^{2}", "e^2"),
        (r"\frac{\ln 2}{\ln 2-\ln 3}", r"\frac{\log 2}{\log 2-\log 3}"),
        (r"\frac{3i}{2}", r"\frac32 i"), (r"\frac{1+i}{2}", r"\frac12+\frac{i}{2}"), ("i", r"\sqrt{-1}"),
        (r"\frac{1}{\mathrm{e}}", "e^{-1}"),
    ],
    "expressions": [
        ("x^2+2x+1", "(x+1)^2"), ("p - q", "-q + p"), ("(b+2)(a+5)", "(a+5)(b+2)"),
        ("n(n+1)/2", r"\frac{n(n+1)}{2}"),
        (r"mn - \lfloor m/2 \rfloor", r"m n-\lfloor m / 2\rfloor"), ("5r^5", "5 r^{5}"), ("ab", "ba"),
        ("zyx", "xyz"),
        (r"\frac{1}{2n+2}", r"\frac{1}{2(n+1)}"), (r"\frac{\cos x}{\sin x}", r"\cot x"),
        ("2^{k}/2", "2^{k-1}"),
        (r"\left\lfloor\log_2 n\right\rfloor+1", r"\left\lfloor\log _{2} n\right\rfloor+1"), ("x**2", "x^2"),
        ("2RC + C + R", "2RC+R+C"), (r"\binom{2n}{n}", r"\frac{(2n)!}{n!n!}"), ("6m", "m*6"),
    ],
    "leading assignments": [
        ("x=5", "5"), ("5", "x=5"), ("x = 5", "x=5"), ("y = 2x + 3", "2x+3"), ("2x+3", "y = 2x + 3"),
        ("f(x)=2x", "2x"), ("f(t)=t^2", "f(x)=x^2"), (r"m_{\max }=n^{2}-n-1", "n^2-n-1"), ("m+n=113", "113"),
        (r"\theta = 30^\circ", r"30^\circ"), (r"x \in [-2,7]", "[-2,7]"), ("k=3", "3"),
        ("(x,y)=(3,2)", "(3,2)"),
        (r"\angle ABC = 90^\circ", "90"), ("f(2) = 7", "7"), ("x_1 = 4", "4"), (r"\text{Area} = 12", "12"),
        ("N(n)=n+1", "n+1"),
        (r"|AB|=2\sqrt3", r"2\sqrt{3}"), (r"2\sqrt3", r"|AB|=2\sqrt3"), (r"\sin A=\frac35", r"\frac{3}{5}"),
        (r"\sin A = \frac{\sqrt3}{2}", r"\frac{\sqrt{3}}{2}"), ("f^{-1}(x)=2x+1", "2x+1"),
        ("AB^2 = 12", "12"),
        (r"(r,\theta)=(3,\pi/2)", r"(3,\frac{\pi}{2})"), (r"P(A|B)=\frac{\pi}{4}", r"\frac{\pi}{4}"),
        (r"\text{proj}_{\mathbf w}\mathbf v=(1,2)", "(1,2)"), (r"\|\mathbf{v}\|=\sqrt5", r"\sqrt5"),
        (r"x+y=2\sqrt3", r"2\sqrt3"), (r"\frac{NO}{BO}=\frac12", r"\frac12"), ("A:B=1", "1"),
        ("x=2+3=5", "5"), (r"\sin A=\frac{6}{10}=\frac35", r"\frac35"), (r"A=\{1,2\}", "1,2"),
        ("D=[0,1)", "[0,1)"),
    ],
    "equations and inequalities": [
        ("y=2x", "2x-y=0"), ("10x-14y+22z+8=0", "5x - 7y + 11z + 4 = 0"), ("5=x", "x=5"), ("2y=4x", "y=2x"),
        ("-5x+7y-11z=4", "5x - 7y + 11z + 4 = 0"), ("x^2+y^2=4", "4=y^2+x^2"), (r"2 \le k", r"k \geqslant 2"),
        (r"k \geq 2", r"k \geqslant 2"), (r"x > 3", "3 < x"), (r"[2,\infty)", r"k \ge 2"),
        ("x >= 5", r"x \ge 5"), ("x<=5", r"x \leq 5"), ("x != 2", r"x \ne 2"), ("x!=2", r"x \neq 2"),
        (r"x \gt 3", "x>3"), ("x >= 5", r"[5,\infty)"), ("n! = 6", "6"),
    ],
    "several answers in any order": [
        ("2, 1", "1,2"), ("1,3,5", "5, 3, 1"), (r"10 \text{ or } 12", "10, 12"), ("$1$ or $2$", "1,2"),
        ("1, 2, and 3", "3,2,1"), (r"\{1,2\}", "1,2"), (r"\{2,1\}", r"\{1,2\}"), ("{1,2}", r"\{1, 2\}"),
        ("x=1, x=2", "2,1"), ("x = 1 or x = 2", "1,2"), (r"1 - \sqrt{19}, 1 + \sqrt{19}", r"1 \pm \sqrt{19}"),
        (r"1 \mp \sqrt{19}", r"1 \pm \sqrt{19}"), (r"x = \pm 2", "-2,2"),
        (r"\{-2, 1-\sqrt5, 1+\sqrt5\}", r"\{1\pm\sqrt{5},-2\}"),
        ("$84$,$69$", "$69$,$84$"), (r"0.5, \frac{32}{9}", r"$\frac{32}{9}$,$\frac{1}{2}$"), ("1; 2", "1,2"),
        ("f(x)=x+1, f(x)=-1", "$f(x)=-1$,$f(x)=x+1$"), (r"\{5\}", "5"), (r"\emptyset", r"\emptyset"),
        ("3,1,1,16", "16,3,1,1"),
        (r"10^{1/100}, 10^{100}", r"$10^{100}$,$10^{1 / 100}$"), ("(3,4),(1,2)", "(1,2),(3,4)"),
        ("100, 200, 300", "100,200,300"),
        (r"\pm2", "2,-2"), (r"x=\pm2", "-2,2"), (r"(0,\pm2)", "(0,2),(0,-2)"),
        (r"\pm\sqrt3", r"-\sqrt3,\sqrt3"),
        (r"3\pm2\sqrt2", r"3-2\sqrt2, 3+2\sqrt2"),
    ],
    "tuples and intervals": [
        (r"(3, \pi/2)", r"\left( 3, \frac{\pi}{2} \right)"), ("[0,1)", r"\left[0, 1\right)"),
        ("(2, 4)", "(2,4)"),
        (r"(-\infty,2)\cup(3,\infty)", r"(-\infty, 2) \cup (3, \infty)"),
        (r"(3,\infty)\cup(-\infty,2)", r"(-\infty, 2) \cup (3, \infty)"),
        (r"(2, inf)", r"(2,\infty)"), (r"(-\infty,0]", r"(-\infty, 0]"),
        ("(3/2, -13)", r"\left( \frac{3}{2}, -13 \right)"),
        ("(312, 123, 231)", "(312,123,231)"), ("3,2", "(3,2)"), ("x=3, y=2", "(3,2)"),
        (r"(\tfrac35, \tfrac83]", r"\left(\frac{3}{5},\frac{8}{3}\right]"),
        (r"(-\infty,0)\cup\{1\}", r"$(-\infty, 0) \cup\{1\}$."), (r"[0,2)\cup[2,3]", "[0,3]"),
        (r"2 < x < 5", "(2,5)"),
    ],
    "matrices": [
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"\begin{bmatrix}1\\2\end{bmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"\begin{pmatrix}0.2\\-3.6\end{pmatrix}", r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}"),
        (r"\left[\begin{matrix}-1&0\\0&-1\end{matrix}\right]",
        r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}"),
        (r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]", r"\begin{bmatrix}1 & 2\\ 3 & 4\end{bmatrix}"),
        (r"\begin{pmatrix}\frac{-1}{3}\\\frac23\\\frac53\end{pmatrix}",
        r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}"),
        (r"\left(\begin{array}{c}1\\2\end{array}\right)", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\left(\begin{matrix}1\\2\end{matrix}\right)", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\left(\begin{smallmatrix}1\\2\end{smallmatrix}\right)", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\mathbf v=\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\text{proj}_{\mathbf w}\mathbf v=\begin{pmatrix}1\\2\end{pmatrix}",
        r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"-\begin{pmatrix}1\\-2\end{pmatrix}", r"\begin{pmatrix}-1\\2\end{pmatrix}"),
        (r"\frac{1}{6}\begin{pmatrix}1\\x\end{pmatrix}", r"\begin{pmatrix}1/6\\x/6\end{pmatrix}"),
        (r"2 \cdot \begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\4\end{pmatrix}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}-t\begin{pmatrix}1\\0\end{pmatrix}",
        r"\begin{pmatrix}1-t\\2\end{pmatrix}"),
        (r"\begin{pmatrix}1\\[4pt]2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ],
    "units": [
        (r"5\text{ cm}", "5"), ("5 cm", "5"), ("5", r"5\text{ cm}"), (r"15 \text{ cm}^2", r"15\mbox{ cm}^2"),
        (r"864", r"864 \mbox{ inches}^2"),
        (r"864 \text{ square inches}", r"864 \mbox{ inches}^2"), ("5 km", r"5000\text{ m}"),
        (r"90 \text{ minutes}", r"1.5 \text{ hours}"),
        (r"5.4", r"5.4 \text{ cents}"), (r"\$18.90", "18.9"), ("18.90 dollars", r"\$18.90"),
        (r"60 \text{ km/h}", "60 km/h"),
        (r"60 \text{ kilometers per hour}", r"60 \text{ km/h}"), ("12 apples", "12"),
        (r"\frac{41}{12} \text{ km}", r"\frac{41}{12}"),
        ("3 feet", r"36 \text{ inches}"), (r"20\pi \text{ cm}^3", r"20\pi"),
        (r"2\sqrt{3}\text{ m}", r"\sqrt{12}"), ("1 hour", "60 min"),
        ("50 students", r"50 \text{ students}"), (r"166\ \mathrm{cm}^2", "166"),
        ("2 meters", r"200\text{ cm}"), (r"\text{5 cm}", "5"),
        (r"5\text{ units}", "5"), ("5 square units", "5"), (r"\frac32\text{ units}^2", r"\frac32"),
        ("5 sq. units", "5"),
        (r"15\ \mathrm{cm^2}", "15"), (r"15\ \mathrm{cm^2}", r"15\text{ cm}^2"),
        ("5", r"5\text{ square units}"),
    ],
    "percentages": [
        (r"50\%", "50"), (r"50\%", "0.5"), ("0.5", r"50\%"), ("50", r"50\%"), (r"8 \%", r"$8 \%$"),
        ("62.5%", r"62.5\%"),
        ("17.5 percent", "17.5%"), (r"\frac{1}{2}", "50%"), (r"12\frac{1}{2}\%", "12.5%"),
    ],
    "degrees and bases": [
        (r"120^\circ", "120"), ("120", r"120^{\circ}"), ("120 degrees", r"120^\circ"),
        (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}^\circ"),
        ("45°", r"45^\circ"), (r"18.8^{\circ}", "18.8"), (r"(45, 60)", r"(45^{\circ}, 60^{\circ})"),
        ("52_8", "52_{8}"), ("52", "52_8"),
        (r"4210_{5}", r"4210_5"),
    ],
    "words": [
        (r"\text{Evelyn}", "Evelyn"), ("evelyn", r"\text{Evelyn}"), (r"\textbf{east}", r"\text{east}"),
        ("Monday", "monday"),
        (r"\mathrm{Tuesday}", "Tuesday"), ("even", r"\text{even}"), ("A", r"\text{A}"), (r"\text{(C)}", "C"),
        ("(C)", r"\text{(C)}"),
        ("C.", "C"), ("Yes", "yes"), ("No", r"\text{no}"), (r"\text{no solution}", "No solution"),
        (r"\text{True}", "True"),
        (r"\text{Tom, Ann}", r"\text{Ann and Tom}"), (r"\text{Navin}.", r"\text{Navin}"),
    ],
    "numbers in words": [
        ("5 million", "5000000"), (r"5\text{ million}", "5,000,000"), (r"\$2.5 million", "2500000"),
        ("2500000", "2.5 million"), (r"3\text{ thousand dollars}", "3000"), ("12.25 billion", "12250000000"),
        ("1,200 thousand", "1.2 million"),
    ],
    "repeating decimals": [
        (r"0.\overline{3}", r"\frac13"), (r"1.2\overline{34}", r"\frac{1222}{990}"), (r"0.\bar{6}", "2/3"),
        (r"-0.\overline{09}", r"-\frac{1}{11}"), (r".\overline{5}", r"\frac59"), (r"0.\dot 3", r"\frac13"),
    ],
    "Unicode": [
        ("½", r"\frac12"), ("3½", "3.5"), ("2 ¾", "2.75"), ("√2", r"\sqrt2"), ("3√12", r"6\sqrt{3}"),
        ("√(x+1)", r"\sqrt{x+1}"),
        ("x²", "x^2"), ("10³", "1000"), ("10⁻²", "0.01"), ("x¹²+y₁", "x^{12}+y_1"), ("2⋅3", "6"),
        ("θ", r"\theta"),
        ("⟨1, 2⟩", r"\langle 1,2\rangle"), ("x ≥ 2", r"x \ge 2"),
    ],
    "unions as inequalities": [
        (r"x<2 \text{ or } x>3", r"(-\infty,2)\cup(3,\infty)"),
        (r"x>3 \text{ or } x<2", r"(-\infty,2)\cup(3,\infty)"),
        (r"x \le -1 \text{ or } 0 < x \le 3", r"(-\infty,-1]\cup(0,3]"),
        ("x=1 or x>2", r"\{1\}\cup(2,\infty)"),
        (r"2 > x \text{ or } 3 < x", r"(-\infty,2)\cup(3,\infty)"), (r"x<2, x>3", r"x<2 \text{ or } x>3"),
    ],
    "ratios and times": [
        ("1:2", "1 : 2"), (r"1\colon 2", "1:2"), ("1:2", r"\frac12"), (r"a:b=3:4", "3:4"),
        ("3:4:5", "3 : 4 : 5"), ("7:05", "7:05"),
    ],
    "golds as they are published": [
        ("(0,4]", "$t(0,4]$"), (r"t \in (0,4]", "$t(0,4]$"), (r"0<t\le 4", "$t(0,4]$"),
        ("221, 8", "$221,$8$"),
        ("m=221, n=8", "$221,$8$"), ("8, 221", "$221,$8$"), ("8, 221", "$221$,$8$"),
        ("800, 221", "$221$,$800$"),
        ("f(x)=ax+b", "$f(x)=a x+b$, where $b$ is any integer, and $a$ is positive"),
        (r"f(x)=b+ax \text{ where } a>0", "$f(x)=a x+b$, where $b$ is any integer"),
        (r"90^\circ, 90^\circ", r"$\angle B E A_{1}=90$,$\angle A E B_{1}=90$ ^{\circ}"),
    ],
}  # fmt: skip

UNEQUAL = {
    "numbers": [
        ("3", "4"), ("18", "-18"), ("0.333", "0.3333"), ("0.333", r"\frac{1}{3}"), (r"\sqrt{2}", "1.41"),
        (r"\pi", "3.14"),
        ("9" * 1000, "9" * 999 + "8"), ("2^{1000}", "2^{1000}+1"), ("0.0000001", "0.0000002"),
        (r"10^{-8}", "0"),
        (r"2 \times 10^{-9}", "0.000000001"), ("2^{-100}", "0"), ("", "1"), (" ", ""), ("$", "5"),
        (".", "0"), ("-", "0"),
        ("?", "1"), ("x", "1"), (r"\infty", r"-\infty"), ("1e", "1"),
        ("1 2", "12"), ("12 34", "1234"), ("1 2", "2"), ("1 2", "3"), ("5\'", "5"),
        ("8 + 8 + 15 = 32 units", "31"),
    ],
    "thousands": [("1,234", "1235"), ("12,34", "1234"), ("1,234", "1.234"), ("1,234", "234"),
    ("1,234", "234, 1")],
    "fractions and mixed numbers": [
        (r"\frac{1}{2}", r"\frac{2}{1}"), (r"1\frac{4}{5}", r"\frac{4}{5}"), ("14/5", r"1\frac{4}{5}"),
        (r"\frac{1}{0}", "0"),
        (r"\frac{1}{3}", "0.34"),
        (r"\frac{20,000}{\pi}", r"\frac{20}{\pi}"), ("807, 201", "200,807"), ("(200, 807)", "807,200"),
        ("1 1/2", "11/2"), ("1 1/2", "1/2"), (r"1 \frac12", r"\frac{11}{2}"), (r"\frac10", r"\frac20"),
        ("1/0", r"\infty"),
        (r"\tan 90^\circ", r"\frac10"),
    ],
    "roots, constants, complex numbers": [
        ("i", "-i"), ("6-5i", "6+5i"), (r"\sqrt{12}", r"2\sqrt{2}"), (r"\sqrt{-4}", "2"), (r"3\pi", "3"),
        ("e", r"\pi"),
        (r"\frac{3i}{2}", r"\frac32"), (r"\frac{3i}{2}", r"-\frac32 i"),
    ],
    "expressions": [
        ("x", "y"), ("x^2", "x^3"), ("3m", "3"), ("5t", "5"), ("2h", "2"), ("2k", "2"), ("x+1", "y+1"),
        ("2n-2", "2n"),
        ("ab", "a+b"), ("x", "X"), (r"\sin x", r"\cos x"), ("2x", "2"), ("x^{12}", "x^{1}2"),
        ("3r^2", "3R^2"), ("2A", "2a"), (r"\frac{N}{2}", r"\frac{n}{2}"), ("x\'", "x"),
        ("f\'(x)+x", "f(x)+x"), (r"2x^\prime", "2x"),
    ],
    "leading assignments": [
        ("x=5", "6"), ("x=5", "y=5"), ("f(x)=x", "g(x)=x"), ("x^2=4", "x=4"), ("y=2x", "2y"),
        ("x=2, x=3", "2"),
        ("f(x)=x+1", "x+2"),
        (r"|AB|=2\sqrt3", r"3\sqrt{2}"), (r"\sin A=\frac35", r"\frac45"), ("f^{-1}(x)=2x+1", "2x-1"),
        ("x=2+3=5", "4"),
        (r"(r,\theta)=(3,\pi)", r"(3,\frac{\pi}{2})"), ("2y=4x", "4x"), ("5x-7y=0", "0"), ("x-1=n", "n"),
        (r"x \ne 5=5", "n"),
        ("f\'(x)=2x", "f(x)=2x"),
    ],
    "equations and inequalities": [
        ("0", "5x - 7y + 11z + 4 = 0"), ("5x - 7y + 11z + 4 = 0", "0"), ("x^2+1=0", "x^2+4=0"),
        ("y=2x", "y=3x"),
        (r"k > 2", r"k \ge 2"), (r"k \le 2", r"k \ge 2"), ("x=y", "x=-y"), ("2", r"k \ge 2"),
        (r"x \ne 2", "x=2"),
        ("x >= 5", "x > 5"), ("x != 2", "x = 2"), ("x<=5", "x>=5"), ("x >= 5", "5"), ("3!=6", r"3 \ne 6"),
    ],
    "several answers in any order": [
        ("1,2", "1,2,3"), ("1,2,3", "1,2"), ("1,1,2", "1,2,2"), ("1,2", "1"), ("1", "1,2"),
        (r"\{1,2\}", r"\{1,3\}"),
        ("16,3,1", "16,3,1,1"), (r"1+\sqrt{19}", r"1 \pm \sqrt{19}"), ("69", "$69$,$84$"),
        (r"\{1\}", r"\emptyset"),
        ("(1,2),(4,3)", "(1,2),(3,4)"),
        (r"\pm2", "2"), (r"\pm2", "2,-3"), (r"(0,\pm2)", "(0,2)"), (r"(0,\pm2)", "(0,2),(-2,0)"),
    ],
    "tuples and intervals": [
        ("(1,2)", "(2,1)"), ("(0,1)", "[0,1]"), ("[0,1)", "(0,1]"), ("(1,2)", r"\{1,2\}"),
        ("(1,2,3)", "(1,2)"), ("2,3", "(3,2)"),
        ("[1,2]", "1,2"), (r"(2,\infty)", r"[2,\infty)"), (r"(0,9)\cup(9,36)", "(0,36)"), ("(1,2)", "1"),
        ("y=2, x=3", "(3,2)"),
    ],
    "matrices": [
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
        (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\begin{pmatrix}1\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        ("1,2", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
        (r"-\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"2\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\2\end{pmatrix}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}+1", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}\begin{pmatrix}1\\1\end{pmatrix}",
        r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\begin{pmatrix}1&2\end{pmatrix}^T", r"\begin{pmatrix}1&2\end{pmatrix}"),
        (r"\mathbf v=\begin{pmatrix}2\\1\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}+\begin{pmatrix}0&0\end{pmatrix}",
        r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"M=5", r"\begin{pmatrix}5\end{pmatrix}"),
    ],
    "units": [
        (r"7\text{ cm}", "5"), ("5 km", "5 m"), (r"5\text{ cm}", r"5\text{ cm}^2"),
        (r"5\text{ cm}", r"5\text{ m}"), ("12 apples", "12 oranges"),
        (r"60\text{ km/h}", r"60\text{ km}"), ("5 hours", "5 minutes"), (r"\$5", r"5\text{ cents}"),
        ("5 kg", "5 km"), ("3 feet", "3 meters"),
        (r"6\text{ units}", "5"), (r"15\ \mathrm{cm^2}", r"15\text{ cm}"), ("6 square units", "5"),
    ],
    "percentages": [("50%", "5"), ("50%", "0.05"), ("0.5%", "50%"), ("5%", r"5^\circ")],
    "degrees and bases": [
        (r"30^\circ", r"31^\circ"), (r"30^\circ", "300"), ("52_8", "52_7"), ("42", "52_8"),
        (r"90^\circ", r"90\text{ cm}"),
    ],
    "words": [
        ("Tom", "Mot"), ("B", "A"), (r"\text{odd}", r"\text{even}"), ("six", "6"), ("Monday", "Tuesday"),
        ("Yes", "No"), ("(A)", "(B)"),
        ("listen", "silent"), ("east", "seat"), ("Evelyn", "Evelyn, Tom"), ("True", "False"),
        ("5 or so", "5"),
        (r"x \text{ where } y", "x"),
        ("The answer is 5", "5"), (r"\text{The answer is }5", "5"), (r"5\text{ is the answer}", "6"),
    ],
    "numbers in words": [
        ("5 million", "5"), ("5", "5 million"), ("5 million", "5 billion"), (r"5\text{ million}", "5000"),
        ("5 thousand", "500"),
    ],
    "repeating decimals": [
        (r"0.\overline{3}", "0.3"), (r"0.\overline{12}", r"\frac{12}{100}"),
        (r"0.1\overline{6}", r"\frac{16}{99}"),
    ],
    "Unicode": [
        ("½", "2"), ("3½", r"\frac32"), ("√2", "2"), ("x²", "x_2"), ("x²", "2x"), ("10³", "103"),
        ("√(x+1)", r"\sqrt{x}+1"),
    ],
    "unions as inequalities": [
        (r"x\le 2 \text{ or } x>3", r"(-\infty,2)\cup(3,\infty)"),
        (r"x>2 \text{ or } x<3", r"(-\infty,2)\cup(3,\infty)"),
        ("x<2 or x>4", r"(-\infty,2)\cup(3,\infty)"), ("x<2", r"(-\infty,2)\cup(3,\infty)"),
        ("2, 3", r"(-\infty,2)\cup(3,\infty)"),
    ],
    "ratios and times": [
        ("6:00", "7:00"), ("1:00", "12:00"), ("1:2", "2:1"), ("1:2", "1"), ("1:2", "2"), ("6:00", "6"),
        ("3:4", "3:4:5"),
    ],
    "golds as they are published": [
        ("[0,4]", "$t(0,4]$"), ("(0,4)", "$t(0,4]$"), ("2218", "$221,$8$"), ("221", "$221,$8$"),
        ("f(0,4)", "(0,4)"),
        ("f(x)=ax-b", "$f(x)=a x+b$, where $b$ is any integer"),
        ("where", "$f(x)=a x+b$, where $b$ is any integer"),
    ],
}  # fmt: skip


def cases(table):
    return [
        pytest.param(*pair, id=f"{name}: {pair!r}"[:70]) for name, pairs in table.items() for pair in pairs
    ]


@pytest.fixture(scope="module")
def verdicts():
    """All verdicts of the two tables, in one batch."""
    pairs = [(*pair, None) for table in (EQUAL, UNEQUAL) for pairs in table.values() for pair in pairs]
    return dict(zip(pairs, judge_all(pairs, seconds=30.0), strict=True))


@pytest.mark.parametrize(("answer", "gold"), cases(EQUAL))
def test_equal(verdicts, answer, gold):
    verdict = verdicts[answer, gold, None]
    assert verdict.equal, verdict.why


@pytest.mark.parametrize(("answer", "gold"), cases(UNEQUAL))
def test_unequal(verdicts, answer, gold):
    verdict = verdicts[answer, gold, None]
    assert not verdict.equal, verdict.why


def test_verdicts_do_not_depend_on_the_side_for_most_pairs():
    """What only one side writes is never held against it, whichever side that is; few kinds excepted."""
    two_way = [pairs for name, pairs in EQUAL.items() if "equations" not in name and "published" not in name]
    pairs = [pair for pairs in two_way for pair in pairs]
    verdicts = judge_all([(gold, answer, None) for answer, gold in pairs], seconds=30.0)
    one_way = {pair for pair, verdict in zip(pairs, verdicts, strict=True) if not verdict.equal}
    # An answer may name by an expression what the question asked for; the gold answer says the question.
    assert one_way == {
        ("m+n=113", "113"),
        (r"x+y=2\sqrt3", r"2\sqrt3"),
        ("2 + 3 = 5", "5"),
        ("8 + 8 + 15 = 31 units", "31"),
        (r"4 + 3 = 7\text{ apples}", "7"),
        # A number with thousands that the other side shows to be a list: in order, if the answer wrote it.
        ("807, 200", "200,807"),
        (r"\pm324", "-324,324"),
    }


@pytest.mark.parametrize(
    ("answer", "gold", "tolerance", "equal"),
    [
        ("4.25", "4.2", 0.1, True),
        ("4.3", "4.2", 0.1, True),
        ("4.31", "4.2", 0.1, False),
        (r"4.25\%", r"4.2\%", 0.1, True),
        (r"\sqrt{2}", "1.41", 0.01, True),
        (r"\sqrt{2}", "1.41", 0.001, False),
        (r"\frac{21}{5}", "4.2", 0.0, True),
        ("(1.05, 2)", "(1, 2)", 0.1, True),
        ("(1.05, 2.2)", "(1, 2)", 0.1, False),
        ("x", "4.2", 10.0, False),
    ],
)
def test_tolerance(answer, gold, tolerance, equal):
    assert is_equivalent(answer, gold, 30.0, tolerance) is equal


# ------------------------------------------------------------------------------------------- hostile

DEEP = [
    ("(", ")"),
    ("{", "}"),
    ("[", "]"),
    (r"\frac{1}{", "}"),
    (r"\sqrt{", "}"),
    (r"\text{", "}"),
    ("x^{", "}"),
    (r"\{", r"\}"),
]
HOSTILE = [
    "9^{9^{9^{9}}}", "((9!)!)!", "10^{10^{10}}", "10**10**10", r"7^{7^{7^{7}}} \mod 10",
    "2^{2^{2^{2^{2^2}}}}", "100000000!",
    r"\sum_{k=1}^{10^{9}} \frac{1}{k^k}", r"\prod_{k=1}^{10^8} k", r"\binom{10^{10}}{10^{9}}",
    "(x+1)^{10000}", "x^{10^{10}}",
    r"\frac{(x+y+z+w)^{100}}{3}", r"\int e^{x^2}\sin(x^3)dx", r"\int_0^1 x^{x^x} dx", r"\sin(10^{10^5})",
    r"\lim_{x \to 0} x^{x^{x}}",
    *(left * n + "1" + right * n for left, right in DEEP for n in (100, 230)),
    *(left * 250 for left, _ in DEEP), *(right * 250 for _, right in DEEP),
    "1" + "+1" * 900, ",".join(map(str, range(450))), ",".join(rf"\sqrt{{{i}}}" for i in range(150)),
    r"\pm" * 400 + "1", r"1\pm" * 300 + "1",
    "x" * 1900, r"\begin{pmatrix}" * 100, r"\begin{pmatrix}" + "1&" * 500 + r"\end{pmatrix}", "=" * 1000,
    "a" * 500_000, "9" * 1_000_000, "word " * 200_000, r"\frac" * 300, "$" * 999, r"\\" * 900, "1\0\0",
    "\ud800\udfff",
    "1\n2\r\n3\u2028", "__import__('os').system('exit 1')", "}}}{{{", "\\",
    "_" * 1000, "^" * 1000, r"\text{" * 100, "1/0", r"\frac{0}{0}",
    r"\infty - \infty",
    "%" * 500, "°" * 500, "5" + r"\text{cm}" * 200, "1,"*900, r"\cup" * 300, "1e999999999", "0x" + "f" * 500,
    # numbers and powers that are large, but no tower
    r"\binom{20000}{10000}", "2^{66000}", "3^{20000}+1", "5000!", "1999!!", "9^{9999}-9^{9998}",
    "10^{19999}x", "2^{2^{15}}", r"\sqrt{2^{40001}}", r"\sqrt[1000]{10^{19999}}", r"(1+\sqrt{2})^{4000}",
    r"e^{e^{e^{9}}}",
    r"\ln(10^{10^{4}})", r"\pi^{\pi^{\pi^{\pi}}}", r"\frac{1}{10^{10^{10}}}", r"(-1)^{\frac{1}{9^{9^{9}}}}",
    r"\tan(10^{9999})", r"\gcd(10^{5000}, 3^{9000})", r"10^{9999} \mod 7", "0^{0^{0^{0}}}", r"i^{i^{i^{i}}}",
    # sums, products, integrals and limits without a closed form
    r"\sum_{k=1}^{5000} k^{k}", r"\sum_{k=0}^{\infty} \frac{\sin k}{k!+k}",
    r"\sum_{i=1}^{99} \sum_{j=1}^{99} i^j", r"\frac{d}{dx} x^{x^{x^x}}",
    r"\prod_{k=1}^{1000} (x+k)", r"\prod_{k=1}^{\infty} (1+\frac{x}{k^3})", r"\int \sqrt{\sin x+x^3}dx",
    r"\int_0^{\infty} \frac{\sin(x^2)}{\ln(x+2)} dx", r"\int\int\int x^{y^{z}} dx dy dz",
    r"\lim_{n \to \infty} (1+\frac{1}{n^n})^{n!}", r"\lim_{x \to \infty} \frac{\sin(e^x)}{x^{x}}",
    # polynomials and fractions that unfold
    "(a+b+c+d+e)^{60}", "(x+1)^{290}(x-1)^{290}", "(x^2+y^2+z^2)^{99}-1", "((x+1)^{20}+1)^{20}",
    "(a+b+c+d+e+f+g)^{60}", "((x+y)^{30}+1)^{30}", r"\sqrt{((x+1)^{20}+1)^{20}}", "((x+1)^{99}+y)^{29}",
    "(x+y)^{n^{n}}", r"\frac{(x+1)^{200}}{(x-1)^{200}+(y+2)^{150}}", r"\sqrt{(x+y+z)^{51}+\sqrt{x^{31}+1}}",
    "x^{2999}+y^{2998}", "+".join(f"x^{{{i}}}" for i in range(200)), "*".join(f"(x+{i})" for i in range(150)),
    "+".join(rf"\frac{{1}}{{x+{i}}}" for i in range(100)), "+".join(rf"\sqrt{{{i}}}" for i in range(2, 150)),
    r"\sqrt{2+" * 30 + "x" + "}" * 30, r"\frac{1}{1+" * 30 + "x" + "}" * 30, r"\sin(" * 30 + "x" + ")" * 30,
    "|" * 400 + "x", "|x" * 300, r"\lfloor" * 300 + "x", "!" * 900, "5" + "!" * 900, "x" + "'" * 900,
    # sets, unions and relations
    r"\cup".join(f"[{2 * i},{2 * i + 1}]" for i in range(100)), r"\cup".join(f"(0,{i})" for i in range(200)),
    r"\{" + ",".join(f"x^{{{i}}}" for i in range(200)) + r"\}", r"\pm1" * 300, ",".join([r"1\pm x"] * 200),
    "x<" * 600 + "1", r"x \ne " * 200, "x=" * 900 + "1", "1=" * 900 + "x", " or ".join(["x>1"] * 200),
    "x>1 or x<0, " * 100, r"(x^2-1)(x^3-2)(x^5-x-1) > \sin x", r"x^{x} \ge 2^{x}", "x^5-x-1=0, " * 60,
    ":".join("1" * 500), "1:" * 900, "t(0,4]" * 300, "where " * 300, "1 " * 900, "1 1/2 " * 200,
    # matrices
    r"\begin{pmatrix}1\\2\end{pmatrix}+" * 45 + r"\begin{pmatrix}1\\2\end{pmatrix}",
    r"(x+1)^{99}\begin{pmatrix}" + r"x\\" * 200 + r"\end{pmatrix}",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^{9999}", r"\begin{vmatrix}" + "x&y" * 100 + r"\end{vmatrix}",
    r"\begin{array}{c}" * 90, r"\left(\begin{array}{" + "c" * 900, "2" * 900 + r"\begin{matrix}1\end{matrix}",
    # what the normal form unfolds
    "½" * 1900, "²" * 1900, "x²" * 900, "√" * 1900, "√(" * 900, "9⁹⁹⁹⁹⁹⁹⁹⁹⁹⁹", "(x+1)⁹⁹⁹⁹",
    r"0.\overline{3}" * 100,
    "0." + "1" * 900 + r"\overline{" + "7" * 900 + "}", "9" * 1900 + " trillion", "1 million " * 190,
    "9 trillion trillion trillion", r"5\text{ million}" * 100, r"\text{cm^2}" * 180, "<" * 1900, ">=" * 900,
    "!=" * 900,
]  # fmt: skip
HANG_GUARD = 300.0  # seconds for all of them


LONG_DIGITS = r"""
import resource
resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
from plumbing.answers import quick_verdict
ones = "1" * 660
for answer in (ones + "/" + ones * 2 + "x", ones + " " + ones + "/" + ones + "x", "1." * 900,
               "\\frac{" + ones + "}{" + ones + "x", ones * 3):
    verdict = quick_verdict(answer, "3", None)
    assert verdict is None or not verdict.equal
"""


def test_long_digits_take_no_time_in_this_process():
    """quick_verdict runs in the trainer. The first of these took a minute; the kernel ends it after 10 s."""
    done = subprocess.run(
        [sys.executable, "-c", LONG_DIGITS],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_every_hostile_answer_is_wrong_and_decided():
    start = time.monotonic()
    pairs = [(answer, gold, None) for answer in HOSTILE for gold in (r"\frac{3x}{7}", r"\{3, y\}")]
    pairs.append(("2x", "x + x", None))
    verdicts = judge_all(pairs, seconds=0.5)
    assert len(HOSTILE) >= 150
    assert [verdict.equal for verdict in verdicts] == [False] * (len(pairs) - 1) + [True]
    assert not any("died" in verdict.why for verdict in verdicts)
    assert time.monotonic() - start < HANG_GUARD


FRAGMENTS = [
    "1", "2.5", "x", "n", "Tom", " ", ",", "=", "+", "-", "/", "^", "_", "(", ")", "[", "]", "{", "}", r"\{",
    r"\}", "%", "°", "$", "&",
    r"\\", r"\frac", r"\sqrt", r"\pi", r"\infty", r"\pm", r"\cup", r"\le", r"\text{cm}", r"\text{",
    r"\begin{pmatrix}", r"\end{pmatrix}",
    r"\int", r"\sum_", r"\lim", "!", r"\boxed{", "or", ";", ".", "|", "\n", r"\left(", r"\right)", r"\$",
    "\x00", "é",
]  # fmt: skip
SOUP = st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)


@settings(max_examples=150, deadline=None)
@given(SOUP, SOUP)
def test_any_text_gets_a_verdict(answer, gold):
    """Two of one spelling are equal, none is equal to nothing, and no comparison ends a worker."""
    pairs = [(answer, gold, None), (answer, answer, None), ("", gold, None)]
    verdicts = judge_all(pairs, seconds=1.0)
    assert not any("died" in verdict.why for verdict in verdicts)
    assert verdicts[1].equal == bool(answer.strip())
    assert not verdicts[2].equal


@settings(max_examples=100, deadline=None)
@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6))
def test_fractions_are_equal_when_python_says_so(a, b):
    def latex(value, form):
        if form == 0:
            return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
        whole, rest = divmod(abs(value), 1)
        sign = "-" if value < 0 else ""
        if form == 1:
            return rf"{sign}{int(whole)}\frac{{{rest.numerator}}}{{{rest.denominator}}}"
        return f"{value.numerator:,} / {value.denominator}"

    for form in range(3):
        assert is_equivalent(latex(a, form), latex(a, 0))
        assert is_equivalent(latex(a, form), latex(b, 0)) == (a == b)


@settings(max_examples=100, deadline=None)
@given(SOUP)
def test_a_normal_form_stays_short_and_may_be_a_number(text):
    form = normal_form(text)
    assert len(form) <= 10 * len(text)
    assert isinstance(number(form), Fraction | None)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_order_matters_in_tuples_only(values, rng):
    shuffled = rng.sample(values, len(values))
    a, b = (", ".join(map(str, v)) for v in (values, shuffled))
    assert is_equivalent(b, a) and is_equivalent(rf"\{{{b}\}}", rf"\{{{a}\}}")
    assert is_equivalent(f"({b})", f"({a})") == (values == shuffled)
    assert not is_equivalent(f"{b}, {values[0]}", a)


# ---------------------------------------------------------------------------------------- benchmarks

FOLDER = Path(os.environ.get("NANODIRL_BENCHMARKS", Path(__file__).parents[1] / "data/hub"))
NAMES = ["math500", "gsm8k", "aime24", "aime25", "olympiadbench"]


def questions(name: str) -> list[Question]:
    """A benchmark as evaluate.py reads it, units and tolerances included."""
    if not (FOLDER / f"{name}.jsonl").exists():
        pytest.skip(f"no {name}.jsonl in {FOLDER}")
    return read_questions(str(FOLDER / f"{name}.jsonl"))


def restyled(gold: str) -> str:
    """The same answer by another hand: other fractions, no dollars, no brackets that grow, other spaces."""
    if r"\$" not in gold:
        gold = gold.replace("$", "")
    for old, new in (
        (r"\frac", r"\dfrac "),
        (r"\left", ""),
        (r"\right", ""),
        (r"\text{", r"\mathrm{"),
        (",", " , "),
    ):
        gold = gold.replace(old, new) if (old != "," or not gold[-3:].isdigit()) else gold
    return f" {gold}\n"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("style", [str, restyled])
def test_a_gold_answer_is_right(name, style):
    asked = questions(name)
    texts = [f"We get 7, no, wait. Hence the answer is $\\boxed{{{style(q.gold)}}}$." for q in asked]
    graded = grade([example(text) for text in texts], asked, Utf8(), block_size=4)
    assert [g.question.gold for g in graded if not g.correct] == []


# Equal except for what the question settles: a unit, a degree sign, the name of the unknown.
TRULY_EQUAL = {
    frozenset(pair)
    for pair in [
        ("$f(x)=1$", "1"), ("$k=1$", "1"), ("$k=3$", "3"), ("120", r"120^\circ"), (r"15\mbox{ cm}^2", "15"),
        ("5", "x=5"),
        (r"2 \sqrt{5}", r"2\sqrt{5}"),
    ]
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_gold_answer_is_wrong_for_other_questions(name):
    rng, asked = random.Random(0), questions(name)
    pairs = []
    for i, q in enumerate(asked):
        pairs += [(other.gold, q.gold, q.tolerance) for other in rng.sample(asked[:i] + asked[i + 1 :], 20)]
    verdicts = judge_all(pairs, seconds=30.0)
    accepted = {frozenset(p[:2]) for p, v in zip(pairs, verdicts, strict=True) if v.equal and p[0] != p[1]}
    assert accepted <= TRULY_EQUAL
