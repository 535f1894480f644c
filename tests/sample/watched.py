"""The decoder's device side with what it does taken down: the logits of each token, and the steps of each loop."""

import functools

import jax
import numpy as np

from jaxlm.sample import slots


def _compiled(monkeypatch, name: str):
    """One of its programs compiled anew, so that it is traced with what a test has put in."""
    plain, donated = getattr(slots, name).__wrapped__, {"place": 1, "decode": 2}[name]
    fresh = jax.jit(functools.wraps(plain)(lambda *args: plain(*args)), static_argnums=0, donate_argnums=donated)
    monkeypatch.setattr(slots, name, fresh)


def logits(monkeypatch) -> dict[tuple[int, int], np.ndarray]:
    """{(sample id, number of the token): float32 [V] that it was drawn from}, filled in while the decoder runs."""
    found: dict[tuple[int, int], np.ndarray] = {}
    emit = slots._emit

    def note(sample_id_R, count_R, slot_R, logits_RV, B):
        for sample_id, count, slot, row in zip(*map(np.asarray, (sample_id_R, count_R, slot_R, logits_RV))):
            if slot < B:
                found[int(sample_id), int(count)] = row.copy()

    def watched(state, settings, slot_R, count_R, logits_RV):
        B = state.finished_B.shape[0]
        jax.debug.callback(functools.partial(note, B=B), settings.sample_id_R, count_R, slot_R, logits_RV)
        return emit(state, settings, slot_R, count_R, logits_RV)

    monkeypatch.setattr(slots, "_emit", watched)
    for name in ("place", "decode"):
        _compiled(monkeypatch, name)
    return found


def steps(monkeypatch) -> list[int]:
    """How many steps each call of `slots.decode` has taken, in order, filled in while the decoder runs."""
    taken: list[int] = []
    loop = jax.lax.while_loop

    def watched(more, body, carry):
        out = loop(more, body, carry)
        if isinstance(carry, tuple) and isinstance(carry[-1], slots.Slots):
            jax.debug.callback(lambda step: taken.append(int(step)), out[0])
        return out

    monkeypatch.setattr(jax.lax, "while_loop", watched)
    _compiled(monkeypatch, "decode")
    return taken
