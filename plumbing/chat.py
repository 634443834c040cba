"""Questions from the command line or a chat, and what their answers are shown as."""

from __future__ import annotations

import argparse
import math
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from plumbing.common import AT_END, InputError, progress, tell
from plumbing.config import Parser, readable
from plumbing.show import Answer, figures, moves, show

# From a question, the turns before it and the options to the answer.
Answers = Callable[[str, list[dict[str, str]], argparse.Namespace], Answer]

HELP = """\
/static          a token per step        /dynamic         all tokens that are sure enough
/threshold 0.7   how sure that is        /temperature 1   0: the most probable token
/seed 3          of the draws            /max-tokens 99   of an answer
/reset           forget the turns so far /help  /quit     Anything else is a question."""


# -------------------------------------------------------------------------- the command line


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """What reads a number of the command line or of a command: from `low` to `high`."""
    expected = f"expected a {'whole ' if kind is int else ''}number of at least {low}"
    expected += f" and at most {high}" if high < math.inf else ""

    def read(text: str) -> Any:
        with suppress(ValueError):
            value = kind(text)
            if low <= value <= high and value < math.inf:
                return value
        raise argparse.ArgumentTypeError(f"{text!r}, {expected}")

    return read


def animation_name(text: str) -> Path:
    """A file of the command line that is to be an animated picture."""
    if not text.lower().endswith(".gif") or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a name that ends with .gif")
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}, there is no such folder")
    return Path(text)


NUMBERS = {
    "threshold": number(float, 0, 1),
    "temperature": number(float, 0),
    "seed": number(int, 0, 2**63 - 1),
    "max_tokens": number(int, 1, 2**31),
}


def read_options(description: str) -> argparse.Namespace:
    """The arguments of this process: a checkpoint, perhaps a question, and how to answer.

    Raises:
        InputError: a bad one, or a picture without a question.
    """
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or hub id")
    parser.add_argument("question", type=readable, nargs="?", help="none: a chat")
    static = {"action": "store_const", "const": "static", "default": "dynamic"}
    parser.add_argument("--static", dest="rule", help="a token per step", **static)
    parser.add_argument(
        "--threshold", type=NUMBERS["threshold"], default=0.9, help="of the dynamic rule: 0.9"
    )
    parser.add_argument("--temperature", type=NUMBERS["temperature"], default=0.0, help="0, which is greedy")
    parser.add_argument("--seed", type=NUMBERS["seed"], default=0, help="of the draws: 0")
    parser.add_argument(
        "--max-tokens",
        type=NUMBERS["max_tokens"],
        help="of an answer: 256, at most half of what the model has",
    )
    parser.add_argument("--pace", type=number(float, 0), help="seconds per step; 0: at once")
    parser.add_argument("--gif", type=animation_name, metavar="FILE", help="both rules, side by side")
    parser.add_argument("--engine", choices=["auto", "torch", "lmdeploy"], default="auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    # Not one request: LMDeploy takes some of the cache for itself, and one of full length has to fit.
    parser.set_defaults(max_batch=2, cache_gib=0.0)
    options = parser.parse_args()
    if options.gif and options.question is None:
        raise InputError("argument --gif: it needs a question")
    return options


def answer_questions(options: argparse.Namespace, answers: Answers, by_blocks: bool) -> None:
    """Answer the question of the command line, or chat.

    Args:
        by_blocks: whether the rules make a difference; if not, the model decodes a token per step.
    """
    if hasattr(sys.stdout, "reconfigure") and "utf" not in (sys.stdout.encoding or "").lower():
        sys.stdout.reconfigure(errors="backslashreplace")  # not all letters are known there
    if options.gif:
        animate(options, answers, by_blocks)
    elif options.question is not None:
        with alive("generating"):
            answer = answers(options.question, [], options)
        show(answer, options.pace)
    else:
        chat(options, answers, by_blocks)


@contextmanager
def alive(what: str) -> Iterator[None]:
    """Show for how long something has been going on that does not say how far it is."""
    over = threading.Event()
    bar = progress(desc=what, bar_format="{desc}: {elapsed}", leave=False)

    def refresh() -> None:
        while not over.wait(0.5):
            bar.refresh()

    thread = threading.Thread(target=refresh, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        bar.close()


def animate(options: argparse.Namespace, answers: Answers, by_blocks: bool) -> None:
    """Write the picture of the question's answer by both rules, and say what each of them cost."""
    from plumbing.picture import write_gif

    found: dict[str, Answer] = {}
    captions = {
        "static": "static: the surest token",
        "dynamic": f"dynamic: every token ≥ {options.threshold:g}",
    }
    for rule, caption in captions.items() if by_blocks else [("static", "autoregressive")]:
        changed = argparse.Namespace(**vars(options) | {"rule": rule})
        with alive(rule):
            answer = found[caption] = answers(options.question, [], changed)
        print(f"{caption}: {figures(answer)}\n  {answer.text!r}")
    texts = {answer.text for answer in found.values()}
    if len(found) > 1:
        print("the two answers " + ("differ" if len(texts) > 1 else "are the same"))
    frames = write_gif(options.gif, options.question, found, 0.2 if options.pace is None else options.pace)
    print(f"{options.gif}: {frames} frames, {options.gif.stat().st_size / 1000:.0f} kB")


# ------------------------------------------------------------------------------------ chat


def chat(options: argparse.Namespace, answers: Answers, by_blocks: bool) -> None:
    """Answer line after line of standard input, with the turns before, until it ends or says /quit."""
    sys.stdin.reconfigure(errors="surrogateescape")  # what is no UTF-8 is refused below
    history: list[dict[str, str]] = []
    edit_lines()
    if sys.stdin.isatty():
        print("Ask, or /help. /quit or Ctrl-D ends.")
    while (line := next_line()) is not None and line != "/quit":
        try:
            if line.startswith("/"):
                print(obey(line, options, history, by_blocks), flush=True)
            elif line:
                turn(line, options, history, answers)
        except (InputError, argparse.ArgumentTypeError) as error:
            tell(f"error: {error}")


def next_line() -> str | None:
    """The next line of standard input without the spaces around it; None at its end."""
    try:
        return input("> " if sys.stdin.isatty() and sys.stdout.isatty() else "").strip()
    except EOFError:
        if sys.stdin.isatty():
            print()
        return None


def turn(question: str, options: argparse.Namespace, history: list[dict[str, str]], answers: Answers) -> None:
    """Answer a question and show the answer; both become part of the history.

    Raises:
        InputError: no text, or no room for the answer; the history stays as it was.
    """
    readable(question)
    try:
        with alive("generating"):
            answer = answers(question, history, options)
    except InputError as error:
        further = "; /reset forgets the turns so far" if history else ""
        raise InputError(f"{error}{further}, /max-tokens asks for a shorter answer") from error
    show(answer, options.pace)
    if not moves():  # there they stand below the answer
        print(figures(answer), flush=True)
    history.append({"role": "user", "content": question})
    history.append({"role": "assistant", "content": answer.text})


def obey(line: str, options: argparse.Namespace, history: list[dict[str, str]], by_blocks: bool) -> str:
    """Do what a line such as `/threshold 0.7` says: change options or history; return what to print.

    Raises:
        InputError: not a command, or not its value.
        argparse.ArgumentTypeError: not a number, or out of bounds.
    """
    # Commands with a number.
    name, _, value = line.removeprefix("/").partition(" ")
    field = name.replace("-", "_")
    if field in NUMBERS:
        if not value:
            raise InputError(f"/{name}: it is {getattr(options, field)}; expected a new value behind it")
        setattr(options, field, NUMBERS[field](value.strip()))
        note = ", for /dynamic" if field == "threshold" and options.rule == "static" else ""
        return f"{name} {getattr(options, field)}{note}"

    # Commands without.
    if name not in ("static", "dynamic", "reset", "help"):
        raise InputError(f"/{name}: no such command, see /help")
    if value:
        raise InputError(f"/{name}: expected nothing behind it, found {value!r}")
    if name == "help":
        return HELP
    if name == "reset":
        history.clear()
        return "a new chat"
    if not by_blocks:
        raise InputError(f"/{name}: this checkpoint is autoregressive, it decodes a token per step")
    options.rule = name
    return name + (f", threshold {options.threshold}" if name == "dynamic" else "")


def edit_lines() -> None:
    """Edit lines with the cursor keys; however the process ends, the terminal is then as it was."""
    if sys.stdin.isatty():
        settings = termios.tcgetattr(sys.stdin)
        AT_END.append(lambda: termios.tcsetattr(sys.stdin, termios.TCSANOW, settings))
        with suppress(ImportError):
            import readline  # noqa: F401, from now on input() does so
