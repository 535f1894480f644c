"""Definitions and edits. Importing the package registers them all."""

from experiments import edits, pretrain, sft, shakespeare, sizes

__all__ = ["edits", "pretrain", "sft", "shakespeare", "sizes"]
