"""A certificate that sampler and trainer agree on the log-probabilities of what was sampled.

Policy gradients weigh a token by exp(logp(trainer) - logp(sampler)), so a difference between the two is noise in every
update, and a bug in either of them (a cache, a mask, a position) is a bias that no reward shows. The sampler's values
come with its completions; the trainer's are computed here as a training step would: a full pass without a cache over
right-padded or packed rows, scored by `losses.lm`.

B rows, T row length.
"""

import contextlib
import functools
from collections.abc import Sequence

import jax
import numpy as np

from jaxlm import sharding
from jaxlm.config import UserError
from jaxlm.losses import lm
from jaxlm.nn.definition import CACHE_DTYPES
from jaxlm.nn.transformer import ModelConfig, apply, with_cache_dtype
from jaxlm.sample.engine import MIN_PROMPT_BUCKET, Completion, Sampling, bucket, generate

CHUNK = 128  # positions of a row whose logits exist at once


@functools.partial(jax.jit, static_argnames=("cfg",))
def _score(cfg: ModelConfig, params, tokens_BT, positions_BT, segments_BT, temperature_BT):
    hidden_BTD, _, _ = apply(cfg, params, tokens_BT[:, :-1], positions_BT[:, :-1], segments_BT[:, :-1])
    logprobs_BT = lm.token_logprobs(cfg, params, hidden_BTD, tokens_BT[:, 1:], CHUNK, temperature_BT[:, 1:])[0]
    return sharding.constrain(logprobs_BT, (None, None))  # whole, wherever the host reads it


def _rows(sizes: Sequence[int], length: int | None) -> list[list[int]]:
    """Which sequences share a row of `length` tokens, first fit; without a length each has its own."""
    rows: list[list[int]] = []
    used: list[int] = []
    for i, n in enumerate(sizes):
        r = next((r for r in range(len(rows)) if length is not None and used[r] + n <= length), len(rows))
        if r == len(rows):
            rows.append([])
            used.append(0)
        rows[r].append(i)
        used[r] += n
    return rows


def trainer_logprobs(
    cfg: ModelConfig,
    params,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    temperatures: Sequence[float],
    length: int | None = None,
    rows: int = 16,
    mesh: jax.sharding.Mesh | None = None,
) -> list[np.ndarray]:
    """Of every token of every completion, float32, at the temperature it was sampled with (0 counts as 1).

    `length`: several sequences are packed into rows of so many tokens; without it each has a row of its own. `rows`
    run at a time. `mesh`: where `params` are spread over devices and no mesh is set. Raises `UserError` for a sequence
    that does not fit a row.
    """
    sequences = [[*p, *c.ids] for p, c in zip(prompts, completions, strict=True)]
    longest = max(map(len, sequences), default=0)
    if length is not None and longest > length:
        raise UserError(f"a prompt with its completion has {longest} tokens, and rows have {length}")
    T = bucket(longest, MIN_PROMPT_BUCKET) if length is None else length
    results: list[np.ndarray | None] = [None] * len(sequences)
    layout = _rows([len(s) for s in sequences], length)
    for first in range(0, len(layout), rows):
        # One token more than a row: the model is then fed T, an even shape.
        tokens, positions, segments = np.zeros((3, rows, T + 1), np.int32)
        temperature = np.ones((rows, T + 1), np.float32)
        spans = []
        for b, members in enumerate(layout[first : first + rows]):
            at = 0
            for segment, i in enumerate(members, 1):
                span = slice(at, at + len(sequences[i]))
                tokens[b, span], positions[b, span] = sequences[i], np.arange(len(sequences[i]))
                segments[b, span], temperature[b, span] = segment, temperatures[i] or 1.0
                spans.append((i, b, at + len(prompts[i]) - 1, span.stop - 1))
                at = span.stop
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            logprobs = np.asarray(_score(cfg, params, tokens, positions, segments, temperature))
        for i, b, begin, end in spans:
            results[i] = logprobs[b, begin:end]
    return results


def certificate(
    cfg: ModelConfig,
    params,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    temperature: float | Sequence[float] = 1.0,
    length: int | None = None,
    rows: int = 16,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, float]:
    """|logp(sampler) - logp(trainer)| over the sampled tokens, in nats: {"max", "mean", "tokens"}.

    `completions` as `generate` returned them for `prompts` at `temperature`, one for all or one each; with several
    different ones there are also "temperature_<t>/max" and "/mean". `length`, `rows` and `mesh` as in
    `trainer_logprobs`. One forward pass: cheap beside the rollout, so it can be asked of every fresh one.
    """
    temperatures = [float(t) for t in np.broadcast_to(np.asarray(temperature, np.float64), len(prompts))]
    scored = trainer_logprobs(cfg, params, prompts, completions, temperatures, length, rows, mesh)
    gaps: dict[float, list[np.ndarray]] = {}
    for c, logprobs, t in zip(completions, scored, temperatures):
        gap = np.abs(np.asarray(c.logprobs, np.float64) - logprobs)[list(c.sampled)]
        gaps.setdefault(t, []).append(gap)

    def summary(parts) -> dict[str, float]:
        gap = np.concatenate([np.zeros(0), *parts])
        return {"max": float(gap.max(initial=0.0)), "mean": float(gap.mean()) if gap.size else 0.0}

    each = {t: np.concatenate(parts) for t, parts in sorted(gaps.items())}
    result = summary(each.values()) | {"tokens": float(sum(g.size for g in each.values()))}
    if len(each) > 1:
        result |= {f"temperature_{t:g}/{k}": v for t, g in each.items() for k, v in summary([g]).items()}
    return result


def by_cache_dtype(
    cfg: ModelConfig,
    params,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    names: Sequence[str] = CACHE_DTYPES,
    slots: int | None = None,
) -> dict[str, dict[str, float]]:
    """What keeping keys and values in each of these dtypes costs in agreement: name -> `certificate` of a rollout.

    The dtype is the sampler's alone: the trainer has no cache. Each rollout is scored on what it sampled itself.
    """
    each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    temperatures = [s.temperature for s in each]

    def certified(name: str) -> dict[str, float]:
        completions = generate(with_cache_dtype(cfg, name), params, tokenizer, prompts, each, slots=slots)
        return certificate(cfg, params, prompts, completions, temperatures)

    return {name: certified(name) for name in names}
