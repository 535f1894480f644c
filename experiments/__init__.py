"""Definitions and edits. Importing the package registers them all."""

from experiments import distill, edits, pod, preference, pretrain, reward, rl, sft, shakespeare, sizes

__all__ = ["distill", "edits", "pod", "preference", "pretrain", "reward", "rl", "sft", "shakespeare", "sizes"]
