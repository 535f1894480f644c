"""Work in other processes: in order, and with its errors."""

import pytest

from jaxlm.config import UserError
from jaxlm.data import parallel
from tests.data.tasks import make_square


def test_ordered_map():
    taken = []
    items = (taken.append(i) or i for i in range(50))
    answers = parallel.ordered_map(make_square, items, workers=2, here=3)
    assert [next(answers) for _ in range(4)] == [(i, i * i) for i in range(4)]
    assert len(taken) <= 3 + 2 * 2 + 3  # bounded look-ahead
    assert [a for _, a in answers] == [i * i for i in range(4, 50)]
    assert [a for _, a in parallel.ordered_map(make_square, [1, "jax"], workers=2)] == [1, False]


def test_ordered_map_brings_errors_home():
    with pytest.raises(UserError, match="negative: -1"):
        list(parallel.ordered_map(make_square, [1, -1, 2], workers=2))
    with pytest.raises(RuntimeError, match="a worker process died: exit code 7"):
        list(parallel.ordered_map(make_square, [1, "die"], workers=2))
