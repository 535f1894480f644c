"""Self-correction inside the thinking: how often an answer changes on the way, and whether that is for the better.

The rule. A trace is cut into attempts. A new one begins with a line, or a sentence, that opens with a word of doubt
(`DOUBTS`: wait, actually, hold on, let me check, that is wrong ...; or no, before a comma, a number or the like). An
attempt's candidate is the last value in it: the last number, by `verifiers.number`, or what another `read` finds. So
the results on the way to an answer are no candidates, while what stood before "wait" is one, and what it became is the
next. An attempt without a value has no candidate. With `split=lines` each line is an attempt: for traces that state an
answer a line and no steps.

A change is two neighboring candidates with different values. Traces are compared with the truth by the caller: `right`
says whether a candidate is. First and last candidates are of the trace alone; the reply's answer is compared with the
last.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction

import numpy as np

from jaxlm.config import UserError
from jaxlm.estimates import clustered
from jaxlm.feedback.verifiers import number

DOUBTS = (
    "wait", "nope", "actually", "hold on", "hmm", "oops", "sorry", "let me check", "let me recheck",
    "let me double-check", "let me re-check", "let me try again", "let me reconsider", "let me redo", "check",
    "checking", "that is wrong", "that's wrong", "that is not right", "that's not right", "on second thought",
    "correction", "try again",
)  # fmt: skip
# At the beginning of a line, or after what ends a sentence.
_DOUBT = re.compile(
    r"(?:^|(?<=[.!?;])(?=[ \t]))[ \t]*(?:but |oh,? |so )?(?:no(?= *[-,.!:;0-9]| *$| (?:it|that|wait)\b)|(?:"
    + "|".join(map(re.escape, DOUBTS))
    + r")\b)",
    re.IGNORECASE | re.MULTILINE,
)
# Possessive: of 1.5kg not even the 1 stands by itself.
_VALUE = re.compile(r"(?<![\w.,])[+-]?\$?[0-9]++(?:,[0-9]++)*+(?:\.[0-9]++)?+(?:/[0-9]++)?+%?+(?!\w)", re.ASCII)

Split = Callable[[str], list[str]]
Read = Callable[[str], Hashable | None]


def attempts(trace: str) -> list[str]:
    """The stretches of a trace, each after the first opening with a word of doubt; blank ones are left out."""
    cuts = [0, *(m.start() for m in _DOUBT.finditer(trace)), len(trace)]
    return [piece for a, b in itertools.pairwise(cuts) if (piece := trace[a:b]).strip()]


def lines(trace: str) -> list[str]:
    """The lines of a trace that are not blank."""
    return [line for line in trace.splitlines() if line.strip()]


def last_number(text: str) -> Fraction | None:
    """The last number in a text that stands by itself."""
    values = [v for found in _VALUE.findall(text) if (v := number(found)) is not None]
    return values[-1] if values else None


def candidates(trace: str, split: Split = attempts, read: Read = last_number) -> list:
    """The candidate answers of a trace, in order, by the rule above."""
    return [value for piece in split(trace) if (value := read(piece)) is not None]


@dataclasses.dataclass(frozen=True)
class Traced:
    """What one trace shows. `right[i]` belongs to `values[i]`."""

    values: tuple
    right: tuple[bool, ...]
    answer: Hashable | None  # of the reply, after the thinking
    tokens: int  # length of the trace, in whatever unit the caller counts

    @property
    def changes(self) -> list[tuple[bool, bool]]:
        """(right before, right after) of each change."""
        pairs = zip(self.values, self.values[1:], self.right, self.right[1:])
        return [(was, became) for a, b, was, became in pairs if a != b]


def traced(
    trace: str,
    right: Callable[[Hashable], bool],
    answer: Hashable | None = None,
    tokens: int | None = None,
    split: Split = attempts,
    read: Read = last_number,
) -> Traced:
    """Reads one trace. tokens: its length; None: its characters. answer: as `read` would give it."""
    values = candidates(trace, split, read)
    return Traced(
        tuple(values), tuple(bool(right(v)) for v in values), answer, len(trace) if tokens is None else tokens
    )


def _estimate(values: Sequence[float], prompts: Sequence[Hashable]) -> dict | None:
    return dataclasses.asdict(clustered(values, prompts)) if len(values) else None


def self_correction(samples: Sequence[Traced], prompts: Sequence[Hashable]) -> dict:
    """Rates over samples, each an estimate as a dict; prompts: which samples' errors go together, one each.

    unsaid: traces without a candidate; all other figures are over the rest.
    reconsidered: more than one candidate. changed: at least one change.
    better, worse, sideways: the first candidate wrong and the last right; the reverse; both wrong and different.
    gain: last right minus first right: what reconsidering brought. first_right, last_right: the two.
    kept: the reply's answer is the last candidate.
    of_changes: over single changes: better, worse, sideways, and their number.
    None where nothing is counted.
    """
    if len(samples) != len(prompts):
        raise UserError(f"{len(samples)} traces and {len(prompts)} prompts")
    if not samples:
        raise UserError("a summary needs at least one trace")
    said = [(s, p) for s, p in zip(samples, prompts) if s.values]

    def over(value: Callable[[Traced], float]) -> dict | None:
        return _estimate([float(value(s)) for s, _ in said], [p for _, p in said])

    changes = [(*pair, p) for s, p in said for pair in s.changes]

    def of_changes(wanted: tuple[bool, bool]) -> dict | None:
        return _estimate([float((was, became) == wanted) for was, became, _ in changes], [p for *_, p in changes])

    return {
        "traces": len(samples),
        "unsaid": _estimate([float(not s.values) for s in samples], prompts),
        "reconsidered": over(lambda s: len(s.values) > 1),
        "changed": over(lambda s: bool(s.changes)),
        "better": over(lambda s: not s.right[0] and s.right[-1]),
        "worse": over(lambda s: s.right[0] and not s.right[-1]),
        "sideways": over(lambda s: not s.right[0] and not s.right[-1] and s.values[0] != s.values[-1]),
        "first_right": over(lambda s: s.right[0]),
        "last_right": over(lambda s: s.right[-1]),
        "gain": over(lambda s: int(s.right[-1]) - int(s.right[0])),
        "kept": over(lambda s: s.answer == s.values[-1]),
        "of_changes": {
            "n": len(changes),
            "better": of_changes((False, True)),
            "worse": of_changes((True, False)),
            "sideways": of_changes((False, False)),
        },
    }


def lengths(samples: Sequence[Traced], right: Sequence[bool], prompts: Sequence[Hashable]) -> dict:
    """How long traces are: quantiles, share of empty ones, and the mean for right and for wrong replies.

    right: of each reply. mean, of_right, of_wrong: estimates with the error clustered by prompt.
    """
    if not samples or not len(samples) == len(right) == len(prompts):
        raise UserError(f"{len(samples)} traces, {len(right)} verdicts, {len(prompts)} prompts")
    sizes = [s.tokens for s in samples]

    def mean(wanted: Sequence[bool]) -> dict | None:
        kept = [i for i, w in enumerate(wanted) if w]
        return _estimate([sizes[i] for i in kept], [prompts[i] for i in kept])

    return {
        "mean": mean([True] * len(sizes)),
        "of_right": mean(right),
        "of_wrong": mean([not r for r in right]),
        "empty": _estimate([float(n == 0) for n in sizes], prompts),
        "quantiles": {q: float(np.quantile(sizes, q / 100)) for q in (10, 50, 90, 100)},
    }
