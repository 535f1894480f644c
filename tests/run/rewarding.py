"""Reward functions that a definition names, whose ways the tests choose."""

import threading
import time

import numpy as np

from jaxlm.feedback.scoring import each

WAY = {"now": "length"}
ASKED, HEARD = [], threading.Event()  # the addresses that `reward` was asked for, in order; that there are some


def reward(prompts, completions, metadata):
    ASKED.extend(m["address"] for m in metadata)
    HEARD.set()
    way = WAY["now"]
    if way == "raises":
        raise ValueError("no such luck")
    if way == "hangs":
        time.sleep(5)
    if way == "nan":
        return [0.0] * (len(prompts) - 1) + [float("nan")]
    if way == "none":
        return [None] * len(prompts)
    if way == "chance":
        return np.random.default_rng().normal(size=len(prompts)).tolist()
    return [float(len(set(c.completion.ids))) for c in completions]


one = each(lambda prompt, completion, metadata: reward([prompt], [completion], [metadata])[0], "one")


def rises(prompts, completions, metadata):
    """The number of the step, whatever was said; 0 where nothing is trained on."""
    steps = [m["address"].partition("/")[0] for m in metadata]
    return [float(s) if s.isdigit() else 0.0 for s in steps]


def falls(prompts, completions, metadata):
    return [-v for v in rises(prompts, completions, metadata)]


COURSE = []  # what `course` gives, one evaluation after the other


def course(prompts, completions, metadata):
    held_out = metadata[0]["address"].startswith("eval/")
    return [COURSE.pop(0) if held_out else 0.0] * len(prompts)
