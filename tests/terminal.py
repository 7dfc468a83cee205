"""A terminal in miniature: what a person would see of a stream of text and control sequences."""

from __future__ import annotations

import io
import re

SEQUENCE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")


class Screen(io.StringIO):
    """A stream that says it is a terminal. `lines` is the screen, scrolled-off lines included, without what is blank
    below; colours are dropped, and what it does not know raises."""

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        screen: list[list[str]] = [[]]
        row = column = at = 0
        text = self.getvalue()
        while at < len(text):
            if match := SEQUENCE.match(text, at):
                at, (number, kind) = match.end(), match.groups()
                if kind == "A":
                    row = max(0, row - int(number or 1))
                elif kind == "J" and number in ("", "0"):
                    del screen[row + 1 :]
                    del screen[row][column:]
                elif kind != "m":
                    raise AssertionError(f"a control sequence that this terminal does not know: {match.group()!r}")
                continue
            character, at = text[at], at + 1
            if character == "\r":
                column = 0
            elif character == "\n":
                row, column = row + 1, 0
                screen += [[]] if row == len(screen) else []
            else:
                line = screen[row]
                line += " " * (column + 1 - len(line))
                line[column] = character
                column += 1
        shown = ["".join(line).rstrip() for line in screen]
        while shown and not shown[-1]:
            shown.pop()
        return shown
