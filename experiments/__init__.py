"""Definitions and edits. Importing the package registers them all."""

from experiments import distill, edits, preference, pretrain, reward, rl, sft, shakespeare, sizes

__all__ = ["distill", "edits", "preference", "pretrain", "reward", "rl", "sft", "shakespeare", "sizes"]
