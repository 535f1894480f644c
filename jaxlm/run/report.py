"""Curves as PNG, and a one-page HTML report that needs nothing but itself.

matplotlib is imported where it is used and never needs a display; without it, a training run goes on without a curve.
"""

import base64
import html
import io
import math
from collections.abc import Sequence

import jax
from absl import logging

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.run.log import read_metrics

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito: for all eyes


# --------------------------------------------------------------------------------------------------------------- curves
def new_figure(width: float, height: float):
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install -e '.[report]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure, p) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    storage.write_bytes(p, buffer.getvalue())


def series(records: list[dict], name: str) -> tuple[list[int], list[float]]:
    pairs = [(r["step"], r[name]) for r in records if name in r and math.isfinite(r[name])]
    return [s for s, _ in pairs], [v for _, v in pairs]


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average without bias at the start: value i weighs `weight` to the power of its age."""
    out, total, norm = [], 0.0, 0.0
    for v in values:
        total, norm = total * weight + v, norm * weight + 1.0
        out.append(total / norm)
    return out


def _limits(curves: list[list[float]]) -> tuple[float, float] | None:
    """A range in which the end of training can be seen: the first, steep part may leave at the top."""
    values = sorted(v for c in curves for v in c[len(c) // 20 :])
    if len(values) < 2 or values[0] == values[-1]:
        return None
    low, high = values[0], values[min(len(values) - 1, int(0.98 * len(values)))]
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + 2 * margin


def loss_curve(workdir, unit: str = "nats per token"):
    """Draws training and validation loss, in `unit`, to `report/loss.png`; returns its path.

    None, with a warning, where matplotlib is not installed, and on all processes but the first.
    """
    if jax.process_index() != 0:
        return None
    try:
        figure = new_figure(7.5, 4.2)
    except UserError as e:
        logging.warning("no loss curve: %s", e)
        return None
    records = read_metrics(workdir)
    axes = figure.add_subplot()
    steps, losses = series(records, "train/loss")
    curves = [losses]
    axes.plot(steps, losses, color=COLORS[0], alpha=0.25, linewidth=1)
    axes.plot(
        steps,
        smooth(losses, 1 - 1 / max(1.0, len(losses) / 25)),
        color=COLORS[0],
        linewidth=1.6,
        label="training, smoothed",
    )
    names = dict.fromkeys(k for r in records for k in r if k.startswith("eval/") and k.endswith("/loss"))
    if len(names) == 2:  # one source: the sum over all is the same curve
        names.pop("eval/all/loss", None)
    for i, name in enumerate(names):
        steps, values = series(records, name)
        curves.append(values)
        label = f"validation, {name[len('eval/') : -len('/loss')]}"
        axes.plot(steps, values, "o-", color=COLORS[1 + i % 6], markersize=4, label=label)
    if limits := _limits(curves):
        axes.set_ylim(*limits)
    label_axes(axes, "step", f"loss, {unit}")
    target = storage.path(workdir) / "report" / "loss.png"
    save_figure(figure, target)
    return target


def label_axes(axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def compare(workdirs: Sequence, out, metric: str = "eval/all/loss", names: Sequence[str] | None = None):
    """Draws one metric of several runs over steps, and over seconds, to the PNG `out`; returns its path.

    `UserError` when a run does not have the metric.
    """
    figure = new_figure(10, 4.2)
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    curves = []
    for i, workdir in enumerate(workdirs):
        records = [r for r in read_metrics(workdir) if metric in r and math.isfinite(r[metric])]
        if not records:
            raise UserError(f"{workdir} has no metric {metric!r}")
        label = names[i] if names else storage.path(workdir).name
        values = [r[metric] for r in records]
        curves.append(values)
        style = {"color": COLORS[i % 7], "linestyle": ["-", "--", ":"][i // 7 % 3], "label": label, "marker": "."}
        by_step.plot([r["step"] for r in records], values, **style)
        by_time.plot([r["seconds"] for r in records], values, **style)
    if limits := _limits(curves):
        by_step.set_ylim(*limits)
    label_axes(by_step, "step", metric)
    label_axes(by_time, "seconds", "")
    save_figure(figure, out)
    return storage.path(out)


# ----------------------------------------------------------------------------------------------------------------- page
CSS = """
:root { color-scheme: light dark; --text: #1c1e21; --soft: #5c6370; --line: #d9dce1; --back: #fff; --well: #f4f5f7;
  --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e6ea; --soft: #9aa2af; --line: #3a3f47; --back: #16181c;
  --well: #20242a; --accent: #56b4e9; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 60rem;
  margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; } h2 { font-size: 1.35rem; margin: 2.6rem 0 .6rem;
  padding-top: .9rem; border-top: 1px solid var(--line); } h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
p { max-width: 46rem; margin: .5rem 0; } .soft, figcaption { color: var(--soft); font-size: .92rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 1rem 0 0; } a { color: var(--accent); }
.scroll { overflow-x: auto; margin: .8rem 0; } table { border-collapse: collapse; font-size: .93rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .8rem .32rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; } td.number, th.number { text-align: right; white-space: nowrap; }
pre { background: var(--well); border-radius: .4rem; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem;
  line-height: 1.45; } pre .soft { font-size: inherit; } pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
figure { margin: 1rem 0; } img { max-width: 100%; background: #fff; border-radius: .4rem; }
.pieces { line-height: 2.3; } .pieces span { display: inline-block; text-align: center; margin: 0 2px 2px 0;
  padding: 0 .35rem; border-radius: .3rem; background: var(--well); font-family: ui-monospace, monospace;
  font-size: .9rem; line-height: 1.5; white-space: pre; } .pieces small { display: block; color: var(--soft);
  font-size: .68rem; line-height: 1.2; }
.bar { display: inline-block; height: .75em; background: var(--accent); border-radius: .15em; vertical-align: middle; }
summary { cursor: pointer; color: var(--accent); } .figures { display: flex; flex-wrap: wrap; gap: .8rem 2.4rem;
  margin: 1.2rem 0; } .figures b { display: block; font-size: 1.5rem; line-height: 1.2; } .figures span {
  color: var(--soft); font-size: .88rem; }
"""


def _is_number(x) -> bool:
    try:
        return float(x) is not None
    except ValueError:
        return False


def _cell(x) -> str:
    return f"{round(x, 4):.4g}" if isinstance(x, float) else f"{x:,}" if type(x) is int else str(x)


class Page:
    """Collects the parts of a page; every text is escaped, images are inlined, nothing is fetched from elsewhere."""

    def __init__(self, title: str):
        self._title, self._parts, self._sections = title, [], []

    def _add(self, markup: str) -> None:
        self._parts.append(markup)

    def heading(self, text: str) -> None:
        """Begins a section that the list of contents shows."""
        self._sections.append(text)
        self._add(f'<h2 id="s{len(self._sections)}">{html.escape(text)}</h2>')

    def subheading(self, text: str) -> None:
        self._add(f"<h3>{html.escape(text)}</h3>")

    def paragraph(self, text: str, soft: bool = False) -> None:
        self._add(f"<p{' class=soft' if soft else ''}>{html.escape(text)}</p>")

    def figures(self, pairs: Sequence[tuple[str, str]]) -> None:
        """A row of large numbers, each (number, what it is)."""
        cells = "".join(f"<div><b>{html.escape(n)}</b><span>{html.escape(what)}</span></div>" for n, what in pairs)
        self._add(f'<div class="figures">{cells}</div>')

    def table(self, head: Sequence[str], rows: Sequence[Sequence]) -> None:
        """Numbers stand to the right; a column is one of numbers when all its values are."""
        number = [all(_is_number(r[i]) for r in rows) and bool(rows) for i in range(len(head))]
        kinds = [" class=number" if n else "" for n in number]
        top = "".join(f"<th{k}>{html.escape(h)}</th>" for h, k in zip(head, kinds))
        body = "".join(
            "<tr>" + "".join(f"<td{k}>{html.escape(_cell(x))}</td>" for x, k in zip(r, kinds)) + "</tr>" for r in rows
        )
        self._add(f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>')

    def bars(self, rows: Sequence[tuple[str, float]], head: tuple[str, str]) -> None:
        """(name, share 0..1) each with a bar; the longest bar is the largest share."""
        most = max((share for _, share in rows), default=1.0) or 1.0
        body = "".join(
            f"<tr><td><code>{html.escape(name)}</code></td><td class=number>{share:.2%}</td>"
            f'<td><span class="bar" style="width:{18 * share / most:.2f}rem"></span></td></tr>'
            for name, share in rows
        )
        top = f"<th>{html.escape(head[0])}</th><th class=number>{html.escape(head[1])}</th><th></th>"
        self._add(f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>')

    def pieces(self, pairs: Sequence[tuple[str, object]]) -> None:
        """Tokens side by side, each (text, small print below it)."""
        spans = "".join(f"<span>{html.escape(a)}<small>{html.escape(str(b))}</small></span>" for a, b in pairs)
        self._add(f'<div class="pieces">{spans}</div>')

    def pre(self, text: str, wrap: bool = False) -> None:
        self._add(f"<pre{' class=wrap' if wrap else ''}>{html.escape(text)}</pre>")

    def continuation(self, prompt: str, text: str) -> None:
        """A prompt, set apart by its color, and what came after it."""
        shown = f"<span class=soft>{html.escape(prompt)}</span>{html.escape(text)}"
        self._add(f'<pre class="wrap">{shown}</pre>')

    def details(self, summary: str, text: str) -> None:
        """A long text behind a line that opens it."""
        body = f'<pre class="wrap">{html.escape(text)}</pre>'
        self._add(f"<details><summary>{html.escape(summary)}</summary>{body}</details>")

    def image(self, p, caption: str = "") -> None:
        """A PNG file, inlined; `caption` is also what a reader who cannot see it gets."""
        data = base64.b64encode(storage.path(p).read_bytes()).decode()
        text = html.escape(caption, quote=True)
        below = f"<figcaption>{text}</figcaption>" if caption else ""
        self._add(f'<figure><img alt="{text}" src="data:image/png;base64,{data}">{below}</figure>')

    def render(self) -> str:
        title = html.escape(self._title)
        links = "".join(f'<a href="#s{i}">{html.escape(s)}</a>' for i, s in enumerate(self._sections, 1))
        # What stands before the first section comes before the list of contents.
        first = next((i for i, p in enumerate(self._parts) if p.startswith("<h2")), len(self._parts))
        body = "\n".join([*self._parts[:first], f"<nav>{links}</nav>", *self._parts[first:]])
        return (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{CSS}</style>\n</head>\n'
            f"<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
        )

    def write(self, p) -> None:
        storage.write_text(p, self.render())
