"""Definitions and edits. Importing the package registers them all."""

from experiments import edits, preference, pretrain, reward, rl, sft, shakespeare, sizes

__all__ = ["edits", "preference", "pretrain", "reward", "rl", "sft", "shakespeare", "sizes"]
