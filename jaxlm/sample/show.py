"""Looking at a model: how a text is cut, what may come next, who attends to whom."""

import os
import unicodedata
import warnings
from collections.abc import Sequence

import numpy as np

from jaxlm.config import UserError

BACKGROUNDS = ("\x1b[48;5;24m", "\x1b[48;5;94m", "\x1b[48;5;22m", "\x1b[48;5;53m")  # dark, so that any text is readable
RESET = "\x1b[0m"
EIGHTHS = " ▏▎▍▌▋▊▉█"
LONGEST_ATTENTION = 128  # tokens in a drawing: beyond, no label can be read


def visible(piece: str) -> str:
    """A piece on one line: line ends, tabs and other control characters as pictures."""

    def picture(c: str) -> str:
        if c in "\n\t":
            return "↵" if c == "\n" else "⇥"
        return c if c.isprintable() else f"\\x{ord(c):02x}"

    return "".join(map(picture, piece)) or "∅"


def width(text: str) -> int:
    """Columns that a terminal gives to a text."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def pad(text: str, columns: int) -> str:
    return text + " " * (columns - width(text))


def token_view(tokenizer, ids: Sequence[int], columns: int = 80, color: bool = False) -> str:
    """Pieces with their ids below, wrapped to `columns`; with `color` the pieces have alternating backgrounds."""
    pieces = [visible(p) for p in tokenizer.pieces(ids)]
    cells = [max(width(p), len(str(i))) for p, i in zip(pieces, ids)]
    lines, start = [], 0
    while start < len(pieces):
        end, used = start, 0
        while end < len(pieces) and (end == start or used + cells[end] + 1 <= columns):
            used += cells[end] + 1
            end += 1
        row = range(start, end)
        if color:
            shown = [f"{BACKGROUNDS[n % len(BACKGROUNDS)]}{pad(pieces[n], cells[n])}{RESET}" for n in row]
        else:
            shown = [pad(pieces[n], cells[n]) for n in row]
        gap = " " if color else "|"
        lines += [gap.join(shown).rstrip(), gap.join(str(ids[n]).ljust(cells[n]) for n in row).rstrip(), ""]
        start = end
    size = int(sum(tokenizer.token_bytes[list(ids)]))
    rate = f", {size / len(ids):.2f} bytes a token" if len(ids) else ""
    return "\n".join([*lines, f"{len(ids)} tokens, {size} bytes{rate}"])


def bar(share: float, columns: int) -> str:
    """A horizontal bar of `share` (0..1) of `columns`, to an eighth of a column; never empty above 0."""
    eighths = min(columns * 8, max(round(share * columns * 8), 1 if share > 0 else 0))
    whole, rest = divmod(eighths, 8)
    return EIGHTHS[8] * whole + (EIGHTHS[rest] if rest else "")


def likeliest(tokenizer, probabilities_V: np.ndarray, k: int) -> list[dict]:
    """The k likeliest next tokens: [{"id", "token", "probability"}], likeliest first."""
    order = np.argsort(-probabilities_V[: tokenizer.vocab_size], kind="stable")[:k]
    pieces = tokenizer.pieces(order.tolist())
    return [{"id": int(i), "token": p, "probability": float(probabilities_V[i])} for i, p in zip(order, pieces)]


def probability_table(tokenizer, probabilities_V: np.ndarray, k: int, columns: int = 80) -> str:
    """The next-token distribution as people draw it: token, id, probability, bar; the longest bar is the likeliest."""
    top = likeliest(tokenizer, probabilities_V, k)
    names = [visible(t["token"]) for t in top]
    rest = tokenizer.vocab_size - len(top)
    others = f"({rest} others)"
    wide = max([width(n) for n in names] + [len(others), len("token")])
    room = max(columns - wide - 20, 8)
    lines = [f"{pad('token', wide)}  {'id':>6}  {'probability':>8}"]
    for name, t in zip(names, top):
        share = bar(t["probability"] / top[0]["probability"], room)
        lines.append(f"{pad(name, wide)}  {t['id']:>6}  {t['probability']:>8.3%}  {share}")
    if rest:
        left = max(0.0, 1.0 - sum(t["probability"] for t in top))
        lines.append(f"{pad(others, wide)}  {'':>6}  {left:>8.3%}")
    return "\n".join(lines)


def check_attention_length(tokens: int) -> None:
    """`UserError` when a drawing of so many tokens could not be labelled; asked before the weights are computed."""
    if tokens > LONGEST_ATTENTION:
        raise UserError(f"attention is drawn for at most {LONGEST_ATTENTION} tokens, the prompt has {tokens}")


def attention_png(path, weights_LHTT: np.ndarray, pieces: Sequence[str]) -> None:
    """Draws each layer's attention, the mean over its heads, as a grid with a row a query and a column a key.

    Raises `UserError` for a prompt too long to label, or without matplotlib.
    """
    L, _, T, _ = weights_LHTT.shape
    check_attention_length(T)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import PowerNorm
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install -e '.[report]'") from None
    across = min(L, 4 if T <= 24 else 2)
    down = -(-L // across)
    side = max(3.0, 0.17 * T + 1.2)
    figure = Figure(figsize=(across * side, down * side + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, across, squeeze=False).ravel()
    # A dollar sign would begin a formula.
    labels = [visible(p).replace("$", r"\$") for p in pieces]
    for layer, axis in enumerate(axes):
        if layer >= L:
            axis.axis("off")
            continue
        image = axis.imshow(weights_LHTT[layer].mean(axis=0), norm=PowerNorm(0.5, 0, 1), cmap="magma")
        axis.set_title(f"layer {layer}, mean of {weights_LHTT.shape[1]} heads", fontsize=9)
        axis.set_xticks(range(T), labels, rotation=90, fontsize=7)
        axis.set_yticks(range(T), labels, fontsize=7)
    axes[0].set_ylabel("query: who attends", fontsize=8)
    axes[0].set_xlabel("key: to whom", fontsize=8)
    scale = figure.colorbar(image, ax=list(axes[:L]), shrink=0.6)
    scale.set_label("attention weight; a row sums to 1", fontsize=8)
    scale.ax.tick_params(labelsize=7)
    try:
        with warnings.catch_warnings():  # of characters that the font lacks: they show as boxes
            warnings.simplefilter("ignore", UserWarning)
            figure.savefig(os.fspath(path), format="png", dpi=110)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from e
