"""What every task gives: prompts, each a function of (definition, split, index)."""

import dataclasses
from typing import Literal

from jaxlm.data.conversation import Conversation

Split = Literal["train", "heldout"]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """asked: a text to go on with, or a conversation to answer in. metadata: what a reward function is told besides."""

    asked: str | Conversation
    metadata: dict
    id: str
