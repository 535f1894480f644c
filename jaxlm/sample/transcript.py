"""A reply shown while it is written: its parts by their marks, nothing that a terminal would obey."""

from collections.abc import Callable, Iterable

from jaxlm.data.conversation import MARKS

DIM, RESET = "\x1b[2m", "\x1b[0m"
LABELS = {"thinking": "[thinking] ", "tool_call": "[call] ", "tool_result": "[result] "}


def printable(text: str) -> str:
    """The text without characters that a terminal would obey instead of showing."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


class Printer:
    """Takes the ids of a reply as they come and writes what they say, each part but plain text on lines of its own.

    ids: all that came so far. A character whose bytes are not all there yet is held back.
    """

    def __init__(self, tokenizer, write: Callable[[str], None], color: bool = False, thinking: bool = True):
        """color: parts that are not the answer are dimmed. thinking: show it."""
        control = tokenizer.control
        self.ids: list[int] = []
        self._tokenizer, self._write, self._color, self._thinking = tokenizer, write, color, thinking
        self._control = set(control.values())
        self._opening = {control[pair[0]]: kind for kind, pair in MARKS.items()}
        self._closing = {control[pair[1]] for pair in MARKS.values()}
        self._kind, self._decode = "text", tokenizer.stream()
        self._fresh = True  # at the beginning of a line

    def feed(self, ids: Iterable[int]) -> None:
        held: list[int] = []
        for i in map(int, ids):
            self.ids.append(i)
            if i in self._opening or i in self._closing:
                self._say(held)
                held = []
                self._turn(self._opening.get(i, "text"))
            elif i not in self._control:
                held.append(i)
        self._say(held)

    def finish(self) -> None:
        """Ends what is open, and the line."""
        self._turn("text")
        if not self._fresh:
            self._put("\n")

    def _put(self, text: str) -> None:
        if text:
            self._write(text)
            self._fresh = text.endswith("\n")

    def _shown(self) -> bool:
        return self._thinking or self._kind != "thinking"

    def _say(self, ids: list[int], final: bool = False) -> None:
        text = printable(self._decode(ids, final))
        if self._shown():
            self._put(text)

    def _turn(self, kind: str) -> None:
        """Ends the present part and begins another."""
        self._say([], final=True)
        if self._kind != "text" and self._shown():
            if self._color:
                self._write(RESET)
            if not self._fresh:
                self._put("\n")
        self._kind, self._decode = kind, self._tokenizer.stream()
        if kind != "text" and self._shown():
            if not self._fresh:
                self._put("\n")
            self._put((DIM if self._color else "") + LABELS[kind])
