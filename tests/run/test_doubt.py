"""The settings of doubt that are refused, before anything is trained."""

import dataclasses
import types

import pytest

from jaxlm.config import UserError
from jaxlm.data.tokenizer import BytesTokenizer
from jaxlm.run import objectives
from jaxlm.steps.pretrain import NextToken
from tests.tiny_run import EXPERIMENT


def with_doubt(doubt):
    return dataclasses.replace(EXPERIMENT, objective=NextToken(doubt=doubt))


@pytest.mark.parametrize("doubt", [0.0, -1.0])
def test_doubt_that_teaches_nothing_is_refused(doubt):
    objectives.validate(with_doubt(1.0))
    with pytest.raises(UserError, match=rf"objective\.doubt must be above 0, or none for no such loss, got {doubt}"):
        objectives.validate(with_doubt(doubt))


def test_where_doubt_is_learned_is_nothing_without_doubt():
    objectives.validate(dataclasses.replace(EXPERIMENT, objective=NextToken(1.0, "asides")))
    with pytest.raises(UserError, match=r"objective\.doubt_in=asides is of doubt: set objective\.doubt"):
        objectives.validate(dataclasses.replace(EXPERIMENT, objective=NextToken(None, "asides")))


def test_doubt_needs_the_symbols_of_a_thought():
    objectives.check_tokenizers(with_doubt(1.0), BytesTokenizer())
    known = BytesTokenizer().control
    for symbol in ("<think>", "</think>", "<|im_end|>"):
        other = types.SimpleNamespace(control=known | {symbol: 90})
        objectives.check_tokenizers(with_doubt(None), other)
        with pytest.raises(
            UserError, match=r"objective\.doubt is learned in thoughts, and this tokenizer has no symbols"
        ):
            objectives.check_tokenizers(with_doubt(1.0), other)
