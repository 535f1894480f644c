"""Reward functions that a definition names, whose ways the tests choose."""

import time

import numpy as np

WAY = {"now": "length"}


def reward(prompts, completions, metadata):
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
