"""Every number that the formulas must hit."""

import pytest

from tests.rl import oracles


@pytest.mark.parametrize("check", oracles.CHECKS, ids=lambda f: f.__name__)
def test_oracle(check):
    check()
