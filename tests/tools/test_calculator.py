import contextlib
import random
import time
from fractions import Fraction

import pytest

from jaxlm.tools.calculator import CalculatorError, calculate, format_value

VALUES = {
    # as GSM8K writes them
    "48/2": "24",
    ".5*16": "8",
    "20*.2": "4",
    "1/2*10": "5",
    "2*20*.01": "0.4",
    "+30+46+38+11+18": "143",
    "100-50-30-15": "5",
    "8*18": "144",
    "12.50*3": "37.5",
    "80/100*10": "8",
    "22500*20": "450000",
    "30-(5*2)": "20",
    # as people write them
    "$1,250.50 + $3": "1253.5",
    "1,00,000": "100000",
    "15% of 80": "12",
    "200 + 10%": "200.1",
    "100% - 20%": "0.8",
    "7 % 3": "1",
    "50%*20": "10",
    "2 1/2 * 4": "10",
    "-2 1/2": "-2.5",
    "3 1/2/2": "1.75",
    "2½ + ¼": "2.75",
    "3 x 4 × 5 ÷ 6 · 2": "20",
    "10−4–1": "5",
    "2^10 = ": "1024",
    "2**3**2": "512",
    "-2^2": "-4",
    "5² + 2³": "33",
    "2(3+4)(1)": "14",
    "[2 + {3}] * (4)": "20",
    "6/2(1+2)": "9",
    "--5": "5",
    "5--5": "10",
    "1e3": "1000",
    "7//2": "3",
    "-7 % 3": "2",
    "5!": "120",
    "sqrt(16) + √9": "7",
    "(8/27)^(1/3)": "0.6666666667",
    "4^1.5": "8",
    "2^-1": "0.5",
    "0^0": "1",
    "abs(-3) + max(1, 2) + min(4, 3) + floor(2.7) + ceil(2.1) + round(2.5)": "16",
    "round(3.14159, 2)": "3.14",
    "max(1,250.50, 3) + min(12,7)": "1257.5",
    "2 pi": "6.283185307",
    "1 +\n2": "3",
    # exact
    "0.1+0.2": "0.3",
    "1/3*3": "1",
    "12345678901234567890*98765432109876543210": "1219326311370217952237463801111263526900",
    "2^200": str(2**200),
    "0.1^10": "0.0000000001",
    "sqrt(12345678901234567890123456789012345678901234567890^2)": "12345678901234567890123456789012345678901234567890",
    # rounded where it would not end
    "10/3": "3.333333333",
    "-2/3": "-0.6666666667",
    "100000000000/3": "33333333333.33",
    "1/3000000000": "3.333333333e-10",
    "2^0.5": "1.414213562",
    "144.00": "144",
}

ERRORS = {
    "": "empty",
    " = ": "empty",
    "48/2=24": "equals sign",
    "1/0": "division by zero",
    "5 % 0": "division by zero",
    "1 1/0": "division by zero",
    "0^-1": "division by zero",
    "5 apples": "'apples' at character 3",
    "__import__('os')": "'_' at character 1",
    "open(1)": "'open' at character 1",
    "1+": "ends too early",
    "(1": "not closed",
    "1)": "unexpected",
    "1 2": "unexpected '2'",
    "1,2": "unexpected",
    "1.2.3": "two decimal points",
    "sqrt(-1)": "negative",
    "sqrt(1,2)": "one value",
    "max(1,200)": "max of the one value 1200: it takes several",
    "min(3,100) + 1": "of the one value 3100",
    "3.5!": "factorial",
    "9^9^9": "digits",
    "10^700": "digits",
    "1e99": None,
    "1e-2000": "digits",
    "2^(10^9)": "digits",
    "9" * 1001: "at most 1000",
    "(" * 200 + "1" + ")" * 200: "nested",
    "√" * 900 + "4": "nested",
    "2^" * 400 + "1": "nested",
    "9999!": "factorial",
    "1_000": "'_'",
    "\0": "not part of arithmetic",
    "½/0": "division by zero",
}


@pytest.mark.parametrize("expression", VALUES)
def test_values(expression):
    assert calculate(expression) == VALUES[expression]


@pytest.mark.parametrize("expression", ERRORS, ids=lambda e: repr(e[:20]))
def test_errors_are_one_clear_line(expression):
    if ERRORS[expression] is None:
        assert calculate(expression)
        return
    with pytest.raises(CalculatorError, match=ERRORS[expression]) as e:
        calculate(expression)
    assert "\n" not in str(e.value) and len(str(e.value)) < 200


def random_expression(rng: random.Random, depth: int) -> tuple[str, Fraction]:
    """A text and the value that Python's own arithmetic gives it."""
    if depth == 0 or rng.random() < 0.2:
        whole, part = rng.randrange(1, 10_000), rng.randrange(0, 1000)
        text = rng.choice([f"{whole}", f"{whole:,}", f"{whole}.{part:03}", f"${whole}", f".{part:03}1"])
        return text, Fraction(text.replace(",", "").replace("$", ""))
    (a, x), (b, y) = random_expression(rng, depth - 1), random_expression(rng, depth - 1)
    operator = rng.choice("+-*/")
    if operator == "/" and y == 0:
        operator = "+"
    value = {"+": x + y, "-": x - y, "*": x * y, "/": x / (y or 1)}[operator]
    sign = {"+": "+", "-": rng.choice("-−"), "*": rng.choice("*×"), "/": rng.choice("/÷")}[operator]
    space = rng.choice(["", " "])
    return f"({a}{space}{sign}{space}{b})", value


def test_equals_exact_arithmetic():
    rng = random.Random(0)
    for _ in range(300):
        text, value = random_expression(rng, 4)
        assert calculate(text) == format_value(value), text
        written = Fraction(calculate(text))
        assert abs(written - value) <= abs(value) * Fraction(1, 10**9)
        assert calculate(calculate(text)) == calculate(text)  # what it writes, it reads


def test_any_text_gives_a_value_or_its_own_error_soon():
    rng = random.Random(1)
    alphabet = "0123456789.,+-*/^%()[]!=$xX eE√π½² sqrtminabsof\n\0é😀_'\"\\{}<>;:"
    start = time.monotonic()
    for _ in range(1500):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(0, 60)))
        with contextlib.suppress(CalculatorError):
            assert isinstance(calculate(text), str)
    for text in ("9^" * 20 + "9", "9!" + "*9!" * 240, "1/7+" * 240 + "1", "(1/3)^" * 5 + "1000", "99999^0.99999" * 70):
        with contextlib.suppress(CalculatorError):
            calculate(text)
    assert time.monotonic() - start < 20


def test_what_is_no_text():
    with pytest.raises(CalculatorError, match="text"):
        calculate(None)
