"""Evaluations: one task interface, three kinds of task, results per item, estimates with their errors.

A task is data: a name, a version, and a function from held-out material to items. Its items decide how it is run:
`Choices` by log-likelihood, `Generate` by greedy generation and a scorer, `Rows` by the loss on packed rows. What a
suite returns and writes is plain JSON, so that results of two runs can be compared item by item.

B rows, T positions.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from jaxlm import storage
from jaxlm.config import UserError, nearest
from jaxlm.data.trajectory import Trajectory
from jaxlm.estimates import Estimate, proportion, ratio
from jaxlm.run.load import Run
from jaxlm.sample.engine import Sampling, generate
from jaxlm.sample.score import score
from jaxlm.steps import pretrain

SCHEMA_VERSION = 1
SUITES: dict[str, tuple["Task", ...]] = {}


# ----------------------------------------------------------------------------------------------------------- the items
@dataclasses.dataclass(frozen=True)
class Choices:
    """Which of `choices` continues `prompt`? `answer` is the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue `prompt` greedily until a stop string or `max_tokens`; the task's scorer compares with `target`."""

    prompt: str
    target: str
    max_tokens: int
    stop_strings: tuple[str, ...] = ("\n",)


@dataclasses.dataclass(frozen=True)
class Rows:
    """A source's packed rows; each row becomes one record. `batches(n)` reads at least n of them, or all."""

    source: str
    batches: Callable[[int | None], Iterable[Trajectory]]


@dataclasses.dataclass(frozen=True)
class Heldout:
    """What items are made of: the run's validation rows per source, and their text, cut into documents."""

    rows: list[Rows]
    documents: Callable[[], list[str]]


@dataclasses.dataclass(frozen=True)
class Task:
    """One evaluation.

    `version` goes up with any change of prompt, items or scorer: results of two versions must not be compared.
    `items(heldout, generator)` is deterministic in the generator. `scorer(item, text)` gives 0..1 to a generated text.
    `chance(items)` is what a model that has learned nothing would score at best; unset, choices give one over their
    number and a corpus gives the uniform distribution.
    """

    name: str
    version: int
    items: Callable[[Heldout, np.random.Generator], list]
    scorer: Callable[[Generate, str], float] | None = None
    chance: Callable[[list], float] | None = None


def register(suite: str, *tasks: Task) -> None:
    """Adds a suite under a name; `launch.eval --suite=NAME` finds it."""
    SUITES[suite] = tasks


# ----------------------------------------------------------------------------------------------------------- the kinds
def _fit(run: Run, prompt: list[int], continuation: int) -> tuple[list[int], bool]:
    """The prompt's end that leaves room for `continuation` tokens in the trained context, and whether it was cut.

    The start token stays in front.
    """
    room = run.experiment.data.context - continuation
    if len(prompt) <= room:
        return prompt, False
    keep = 1 if prompt[0] == run.tokenizer.bos and room > 1 else 0
    return prompt[:keep] + prompt[len(prompt) - room + keep :], True


def _split(run: Run, task: Task, items: list, tokens: Callable) -> tuple[list, list[dict]]:
    """The items whose continuation leaves room for a prompt, and records that say why the others were left out."""
    context = run.experiment.data.context
    fitting, skipped = [], []
    for item in items:
        if (n := tokens(item)) < context:
            fitting.append(item)
        else:
            skipped.append(dataclasses.asdict(item) | {"skipped": f"{n} tokens to score, data.context is {context}"})
    if not fitting:
        raise UserError(f"no item of the task {task.name!r} fits data.context {context}: {skipped[0]['skipped']}")
    if skipped:
        logging.warning("%s: %d of %d items do not fit data.context %d", task.name, len(skipped), len(items), context)
    return fitting, skipped


def run_choices(
    run: Run, task: Task, items: list[Choices], limit: int | None
) -> tuple[list[dict], dict[str, Estimate]]:
    """Summed log-likelihood of each choice given the prompt, and the same per byte of the choice's text.

    Prompt and choice are encoded apart: a choice's tokens are the same after any prompt.
    """
    encode = run.tokenizer.encode_batch
    items, skipped = _split(run, task, items[:limit], lambda item: max(map(len, encode(item.choices))))
    sequences, spans, cut = [], [], []
    for item in items:
        prompt = run.encode(item.prompt)
        choices = encode(item.choices)
        # The longest choice decides, so that all choices of an item see the same prompt.
        kept, was_cut = _fit(run, prompt, max(map(len, choices)))
        sequences += [kept + choice for choice in choices]
        spans += [len(choice) for choice in choices]
        cut.append(was_cut)
    sums = iter(
        [
            float(np.sum(x[len(x) - n :], dtype=np.float64))
            for x, n in zip(score(run.model, run.params, sequences), spans)
        ]
    )
    records = []
    for item, was_cut in zip(items, cut, strict=True):
        logprobs = [next(sums) for _ in item.choices]
        per_byte = [x / max(len(c.encode()), 1) for x, c in zip(logprobs, item.choices)]
        picked, picked_per_byte = int(np.argmax(logprobs)), int(np.argmax(per_byte))
        records.append(
            dataclasses.asdict(item)
            | {"logprobs": logprobs, "logprobs_per_byte": per_byte, "prompt_cut": was_cut}
            | {"picked": picked, "picked_per_byte": picked_per_byte}
            | {"correct": picked == item.answer, "correct_per_byte": picked_per_byte == item.answer}
        )
    chance = task.chance(items) if task.chance else float(np.mean([1 / len(i.choices) for i in items]))
    return records + skipped, {
        "accuracy": proportion([r["correct"] for r in records], chance),
        "accuracy_per_byte": proportion([r["correct_per_byte"] for r in records], chance),
    }


def run_generation(
    run: Run, task: Task, items: list[Generate], limit: int | None
) -> tuple[list[dict], dict[str, Estimate]]:
    """Greedy continuations, scored by the task's scorer."""
    items, skipped = _split(run, task, items[:limit], lambda item: item.max_tokens)
    prompts = [_fit(run, run.encode(i.prompt), i.max_tokens)[0] for i in items]
    settings = [Sampling(temperature=0.0, max_tokens=i.max_tokens, stop_strings=i.stop_strings) for i in items]
    completions = generate(run.model, run.params, run.tokenizer, prompts, settings)
    records = [
        dataclasses.asdict(item)
        | {"text": c.text, "finish_reason": c.finish_reason, "logprob": float(sum(c.logprobs))}
        | {"score": float(task.scorer(item, c.text))}
        for item, c in zip(items, completions, strict=True)
    ]
    scores = [r["score"] for r in records]
    return records + skipped, {"score": proportion(scores, task.chance(items) if task.chance else None)}


@functools.partial(jax.jit, static_argnames=("model", "chunk"))
def row_sums(model, chunk: int | None, params, batch: Trajectory, token_bytes_V) -> dict[str, jax.Array]:
    """Per row: {"nats", "tokens", "bytes"} over the scored tokens, float32 [B]."""
    logprobs_BT, _, mask_BT = pretrain.token_logprobs(model, params, batch, chunk)
    return {
        "nats": jnp.sum(jnp.where(mask_BT, -logprobs_BT, 0.0), axis=1),
        "tokens": jnp.sum(mask_BT, axis=1).astype(jnp.float32),
        "bytes": jnp.sum(jnp.where(mask_BT, token_bytes_V[batch.tokens[:, 1:]], 0), axis=1).astype(jnp.float32),
    }


def run_corpus(run: Run, task: Task, items: list[Rows], limit: int | None) -> tuple[list[dict], dict[str, Estimate]]:
    """Nats per token and bits per byte of each source; chance is the uniform distribution over the vocabulary."""
    token_bytes_V = jnp.asarray(run.tokenizer.token_bytes)
    records = []
    for item in items:
        for batch in item.batches(limit):
            sums = jax.device_get(
                row_sums(run.model, run.experiment.train.loss_chunk, run.params, batch, token_bytes_V)
            )
            records += [
                {"source": item.source, "nats": float(a), "tokens": int(t), "bytes": int(b)}
                for a, t, b in zip(sums["nats"], sums["tokens"], sums["bytes"])
                if t > 0  # the last batch is filled up with empty rows
            ]
    if not records:
        raise UserError("the held-out sets have no tokens to score")
    metrics = {}
    uniform = math.log(run.tokenizer.vocab_size)
    for source in dict.fromkeys(r["source"] for r in records):
        nats, tokens, sizes = (
            np.array([r[k] for r in records if r["source"] == source], np.float64) for k in ("nats", "tokens", "bytes")
        )
        metrics[f"{source}/loss"] = ratio(nats, tokens, uniform)
        chance = uniform * tokens.sum() / sizes.sum() / math.log(2)
        metrics[f"{source}/bits_per_byte"] = ratio(nats / math.log(2), sizes, float(chance))
    return records, metrics


KINDS = {Choices: run_choices, Generate: run_generation, Rows: run_corpus}


# ----------------------------------------------------------------------------------------------------------- the suite
def find_suite(name: str) -> tuple[Task, ...]:
    if name not in SUITES:
        raise UserError(f"unknown suite {name!r}; {nearest(name, sorted(SUITES))}")
    return SUITES[name]


def run_task(run: Run, task: Task, heldout: Heldout, seed: int = 0, limit: int | None = None):
    """(records, metrics) of a task; the items are the same for the same held-out text, version and seed."""
    # The task's name is not in the seed: two tasks that draw the same items in the same order do no harm.
    items = task.items(heldout, np.random.default_rng([seed, task.version]))
    if not items:
        raise UserError(
            f"the held-out text gives no items for the task {task.name!r}: it is too small or of another kind"
        )
    return KINDS[type(items[0])](run, task, items, limit)


def add_task(results: dict, name: str, version: int, records: list[dict], metrics: dict[str, Estimate], out) -> None:
    """Puts a task's metrics into the results of its suite and, when `out` is given, its items into `<name>.jsonl`."""
    found = {metric: dataclasses.asdict(e) for metric, e in metrics.items()}
    results["tasks"][name] = {"version": version, "metrics": found}
    if out is not None:
        storage.make_dir(out)
        lines = [json.dumps({"task": name, "version": version, "item": i} | r) for i, r in enumerate(records)]
        storage.write_text(storage.path(out) / f"{name}.jsonl", "\n".join(lines) + "\n")


def run_suite(run: Run, suite: str, heldout: Heldout, out=None, seed: int = 0, limit: int | None = None) -> dict:
    """Runs every task of a suite; writes `<task>.jsonl` and `results.json` under `out` when given. Returns the results:
    {"suite", "step", "seed", "tasks": {name: {"version", "metrics": {metric: Estimate as a dict}}}}.
    """
    tasks = find_suite(suite)
    results = {"schema_version": SCHEMA_VERSION, "suite": suite, "step": run.step, "seed": seed, "tasks": {}}
    for task in tasks:
        add_task(results, task.name, task.version, *run_task(run, task, heldout, seed, limit), out)
    if out is not None:
        storage.write_json(storage.path(out) / "results.json", results)
    return results


def table(results: dict) -> str:
    """The results as aligned text, one metric a line."""
    rows = [("task", "version", "metric", "value", "stderr", "95% interval", "chance", "items")]
    for name, task in results["tasks"].items():
        for metric, e in task["metrics"].items():
            chance = "-" if e["chance"] is None else f"{e['chance']:.3f}"
            interval = f"{e['low']:.3f} .. {e['high']:.3f}"
            rows.append(
                (
                    name,
                    str(task["version"]),
                    metric,
                    f"{e['value']:.4f}",
                    f"{e['stderr']:.4f}",
                    interval,
                    chance,
                    str(e["n"]),
                )
            )
    widths = [max(map(len, column)) for column in zip(*rows)]
    left = {0, 2}
    return "\n".join(
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    )
