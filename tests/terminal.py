"""A terminal for tests: a screen that understands what is written to it, and programs behind a pty.

The screen knows only the sequences that plumbing/show.py may write. Any other control character is an error:
it would be a model's own, or one nobody thought of.
"""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
import unicodedata

TOKEN = re.compile(r"\033\[(\??)([\d;]*)([A-Za-z])|(\033)|(.)", re.DOTALL)


class Screen:
    """Rows and columns of cells, and the lines that have scrolled off at the top.

    Args:
        ambiguous: columns of the characters that some terminals draw wide.
    """

    def __init__(self, columns: int, rows: int, ambiguous: int = 1):
        self.columns, self.rows, self.ambiguous = columns, rows, ambiguous
        self.lines = [[" "] * columns for _ in range(rows)]
        self.gone: list[str] = []
        self.x = self.y = 0
        self.wraps, self.pending = True, False
        self.colours: list[str] = []
        self.too_high = 0  # attempts to go above the first row
        self.wrapped = 0  # lines that were broken by the terminal

    def feed(self, text: str) -> None:
        for match in TOKEN.finditer(text):
            private, numbers, final, escape, character = match.groups()
            assert not escape, f"an unknown sequence at {text[match.start() :][:20]!r}"
            if final:
                self.sequence(private, numbers, final)
            elif character == "\r":
                self.x, self.pending = 0, False
            elif character == "\n":
                self.down()
            else:
                assert character.isprintable(), f"a control character {character!r}"
                self.put(character)

    def sequence(self, private: str, numbers: str, final: str) -> None:
        if private:
            assert (numbers, final) in {(n, f) for n in ("7", "2026", "2004", "1034") for f in "hl"}, numbers
            if numbers == "7":
                self.wraps = final == "h"
            return
        self.pending = self.pending and final == "m"
        if final == "A":
            self.too_high += max(0, int(numbers) - self.y)
            self.y = max(0, self.y - int(numbers))
        elif final == "H" and not numbers:
            self.x = self.y = 0
        elif final == "K" and not numbers:
            self.lines[self.y][self.x :] = [" "] * (self.columns - self.x)
        elif (final, numbers) in (("J", ""), ("J", "2")):
            whole = numbers == "2"
            if not whole:
                self.lines[self.y][self.x :] = [" "] * (self.columns - self.x)
            for y in range(0 if whole else self.y + 1, self.rows):
                self.lines[y] = [" "] * self.columns
        else:
            assert final == "m", f"an unknown sequence {numbers}{final}"
            self.colours.append(numbers)

    def down(self) -> None:
        self.pending = False
        if self.y < self.rows - 1:
            self.y += 1
            return
        self.gone.append("".join(self.lines.pop(0)).rstrip())
        self.lines.append([" "] * self.columns)

    def width(self, character: str) -> int:
        if unicodedata.category(character) in ("Mn", "Me"):
            return 0
        kind = unicodedata.east_asian_width(character)
        return 2 if kind in "WF" else self.ambiguous if kind == "A" else 1

    def put(self, character: str) -> None:
        width = self.width(character)
        if not width:
            return
        if self.pending or self.x + width > self.columns:
            if self.wraps:
                self.x = 0
                self.wrapped += 1
                self.down()
            else:
                self.x = max(0, self.columns - width)
        self.lines[self.y][self.x] = character
        for extra in range(self.x + 1, min(self.x + width, self.columns)):
            self.lines[self.y][extra] = ""
        self.x += width
        self.pending = self.x >= self.columns
        self.x = min(self.x, self.columns - 1)

    @property
    def text(self) -> str:
        """All that can be read, the lines gone at the top included; without the blanks at the ends."""
        shown = ["".join(line).rstrip() for line in self.lines]
        return "\n".join([*self.gone, *shown]).rstrip("\n")


class Program:
    """A process with a pseudo-terminal as its standard input, output and error, and as the one it obeys."""

    def __init__(self, command: list[str], columns: int = 80, rows: int = 24, **options):
        self.master, slave = pty.openpty()
        self.resize(columns, rows)
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            **options,
        )
        self.slave = slave  # stays open, so that its settings can be looked at in the end
        self.output = ""
        self._bytes = b""

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())

    def read(self, seconds: float) -> bool:
        """Take what is there, or comes within so many seconds; whether anything was."""
        if not select.select([self.master], [], [], seconds)[0]:
            return False
        self._bytes += os.read(self.master, 65536)
        self.output = self._bytes.decode(errors="ignore")
        return True

    def until(self, wanted: str, after: int = 0) -> int:
        """Read until `wanted` is in what came after the first so many characters; where it ends."""
        late = time.monotonic() + 120
        while wanted not in self.output[after:]:
            self.read(0.2)
            assert time.monotonic() < late, f"no {wanted!r} in {self.output[-2000:]!r}"
            if self.process.poll() is not None and not self.read(0.2):
                assert wanted in self.output[after:], f"no {wanted!r} in {self.output[-2000:]!r}"
        return self.output.index(wanted, after) + len(wanted)

    def end(self) -> int:
        """Read to the end; the exit code."""
        late = time.monotonic() + 120
        while self.process.poll() is None:
            self.read(0.2)
            assert time.monotonic() < late, "it does not end"
        while self.read(0.05):
            pass
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)
