"""A calculator for expressions as people write them: exact, bounded, and never `eval`.

Values are exact fractions, so 0.1 + 0.2 is 0.3 and integers have all their digits; only a root that is not rational is
rounded. The grammar is read by recursive descent, loosest first: sum, product, sign, power, percent or factorial,
number or parentheses. Every value is bounded in size and every expression in length and depth, so an answer comes in
milliseconds.
"""

import decimal
import math
import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple, NoReturn

LONGEST = 1000  # characters of an expression
DEEPEST = 50  # parentheses, powers and functions within each other
LARGEST_BITS = 2048  # of a numerator or a denominator: some 600 digits
DIGITS = 10  # significant digits of a result that no short decimal equals
EXACT_DIGITS = 15  # digits after the point up to which a decimal is written in full
LARGEST_FACTORIAL = 250
ROOT_DIGITS = 40  # of a root that is not rational, after its integer part


class CalculatorError(ValueError):
    """An expression that has no answer here; one line that says why."""


class Token(NamedTuple):
    kind: str  # "number", "name", "end", or the operator itself
    value: Fraction | str | None
    at: int  # its place in the expression, from 0


# Written forms of one operator. x is a product only between two values, which the parser sees to.
_SAME = {"×": "*", "·": "*", "∙": "*", "⋅": "*", "✕": "*", "∗": "*", "÷": "/", "∕": "/", "⁄": "/", ":": "/"}
_SAME |= {"−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "**": "^", "[": "(", "{": "(", "]": ")", "}": ")"}
_SAME |= {"x": "*", "X": "*", "of": "*"}
_SUPERSCRIPTS = {"²": 2, "³": 3}
_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5"}
_VULGAR |= {"⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8"}
_FUNCTIONS = ("sqrt", "abs", "floor", "ceil", "round", "min", "max")

_NUMBER = re.compile(
    r"(?P<mixed>\d+ +\d+/\d+(?![\d.,]))"  # 2 1/2
    rf"|(?P<vulgar>\d* *[{''.join(_VULGAR)}])"
    r"|(?P<grouped>\d{1,3}(?:,\d{2,3})*,\d{3}(?![\d,])(?:\.\d*)?)"
    r"|(?P<plain>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4}(?![\d.]))?)",
    re.ASCII,
)
_WORD = re.compile(r"[A-Za-z]+")


def calculate(expression: str) -> str:
    """The value of `expression`: an integer in full, else a decimal, rounded to 10 digits where it would not end.

    Understands + - * / ^ ** // !, × ÷ · x, parentheses, 1,250.50, .5, 1e3, $5, 20% (and 15% of 80; 7 % 3 is the
    remainder), 2 1/2, ½, x², 2(3+4), sqrt, abs, floor, ceil, round, min, max, pi, and an equals sign at the end.
    A percentage is a hundredth wherever it stands: 200 + 10% is 200.1. Raises CalculatorError with one line.
    """
    if not isinstance(expression, str):
        raise CalculatorError(f"an expression is text, not {type(expression).__name__}")
    text = expression.strip()
    if len(text) > LONGEST:
        raise CalculatorError(f"the expression has {len(text)} characters; at most {LONGEST} are read")
    text = re.sub(r"\s*=\s*$", "", text)
    if not text:
        raise CalculatorError("the expression is empty")
    return format_value(_Parser(_tokens(text)).parse())


# -------------------------------------------------------------------------------------------------------- writing
def format_value(value: Fraction) -> str:
    """The one way in which a value is written: no exponent unless it is very small or long, no trailing zeros."""
    if value.denominator == 1:
        return str(value.numerator)
    twos = (value.denominator & -value.denominator).bit_length() - 1
    fives, rest = 0, value.denominator >> twos
    while rest % 5 == 0:
        fives, rest = fives + 1, rest // 5
    places = max(twos, fives)
    if rest == 1 and places <= EXACT_DIGITS:
        digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
        return ("-" if value < 0 else "") + f"{digits[:-places]}.{digits[-places:]}"
    with decimal.localcontext() as context:
        # The part before the point keeps all its digits, as integers do, and shows that something follows.
        context.prec = max(DIGITS, len(str(abs(value.numerator) // value.denominator)) + 2)
        rounded = decimal.Decimal(value.numerator) / decimal.Decimal(value.denominator)
        if rounded.adjusted() < -6:
            return format(rounded.normalize(), "e").replace("e-0", "e-")
        text = format(rounded, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


# -------------------------------------------------------------------------------------------------------- reading
def _tokens(text: str) -> list[Token]:
    tokens: list[Token] = []
    at = 0
    while at < len(text):
        c = text[at]
        if c.isspace() or unicodedata.category(c) == "Sc":  # a currency's sign
            at += 1
        elif match := _NUMBER.match(text, at):
            tokens.append(Token("number", _number(match, text), at))
            at = match.end()
        elif c in _SUPERSCRIPTS:
            tokens += [Token("^", None, at), Token("number", Fraction(_SUPERSCRIPTS[c]), at)]
            at += 1
        elif text[at : at + 2] in ("**", "//"):
            tokens.append(Token(_SAME.get(text[at : at + 2], "//"), None, at))
            at += 2
        elif c in "+-*/^()%!," or (c in _SAME and not c.isalpha()):
            tokens.append(Token(_SAME.get(c, c), None, at))
            at += 1
        elif c in "√π":
            tokens.append(Token("name", "sqrt" if c == "√" else "pi", at))
            at += 1
        elif word := _WORD.match(text, at):
            tokens += _words(word.group(), at, text)
            at = word.end()
        elif c == "=":
            raise CalculatorError(f"an equals sign at character {at + 1}: give one expression, without its result")
        else:
            raise CalculatorError(f"{c!r} at character {at + 1} is not part of arithmetic")
    return [*tokens, Token("end", None, len(text))]


def _words(word: str, at: int, text: str) -> list[Token]:
    if word in _SAME:
        return [Token("*", None, at)]
    if word.lower() in _FUNCTIONS or word.lower() == "pi":
        return [Token("name", word.lower(), at)]
    known = ", ".join(_FUNCTIONS)
    raise CalculatorError(f"{word[:20]!r} at character {at + 1} is not a number or one of {known}, pi")


def _number(match: re.Match, text: str) -> Fraction:
    kind, written = match.lastgroup, match.group().replace(",", "")
    if kind in ("mixed", "vulgar"):
        if kind == "vulgar":
            written = f"{written[:-1]} {_VULGAR[written[-1]]}"
        *whole, part = written.split()
        above, below = part.split("/")
        if int(below) == 0:
            raise CalculatorError(f"a division by zero in {match.group()!r}")
        return _bounded(Fraction(int(above), int(below)) + int("".join(whole) or 0))
    if text[match.end() : match.end() + 1] == "." and "." in written:
        raise CalculatorError(f"{match.group()!r} at character {match.start() + 1} has two decimal points")
    mantissa, _, exponent = written.lower().partition("e")
    if exponent and abs(int(exponent)) > LARGEST_BITS:
        raise CalculatorError("a number too large for this calculator")
    return _bounded(Fraction(mantissa) * Fraction(10) ** int(exponent or 0))


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > LARGEST_BITS:
        raise CalculatorError(f"a number of more than {int(LARGEST_BITS * math.log10(2))} digits")
    return value


class _Parser:
    """Recursive descent over the tokens; each method reads what binds at least as tightly as its name says."""

    def __init__(self, tokens: list[Token]):
        self.tokens, self.place, self.depth = tokens, 0, 0

    @property
    def next(self) -> Token:
        return self.tokens[self.place]

    def take(self, *kinds: str) -> Token | None:
        if self.next.kind in kinds:
            self.place += 1
            return self.tokens[self.place - 1]
        return None

    def refuse(self) -> NoReturn:
        token = self.next
        if token.kind == "end":
            raise CalculatorError("the expression ends too early")
        shown = format_value(token.value) if isinstance(token.value, Fraction) else token.value or token.kind
        raise CalculatorError(f"unexpected {shown!r} at character {token.at + 1}")

    def parse(self) -> Fraction:
        value = self.sum()
        if self.next.kind != "end":
            self.refuse()
        return value

    def sum(self) -> Fraction:
        value = self.product()
        while token := self.take("+", "-"):
            other = self.product()
            value = _bounded(value + other if token.kind == "+" else value - other)
        return value

    def product(self) -> Fraction:
        value = self.sign()
        while True:
            if token := self.take("*", "/", "//", "%"):
                value = _multiplied(token.kind, value, self.sign())
            elif self.next.kind in ("(", "name"):  # 2(3+4)
                value = _bounded(value * self.power())
            else:
                return value

    def sign(self) -> Fraction:
        negative = False
        while token := self.take("+", "-"):
            negative ^= token.kind == "-"
        value = self.power()
        return -value if negative else value

    def power(self) -> Fraction:
        self.depth += 1  # everything that nests passes here
        if self.depth > DEEPEST:
            raise CalculatorError(f"the expression is nested more than {DEEPEST} deep")
        value = self.postfix()
        if self.take("^"):
            value = _power(value, self.sign())  # binds to the right: 2^3^2 is 2^9
        self.depth -= 1
        return value

    def postfix(self) -> Fraction:
        value = self.atom()
        while True:
            if self.next.kind == "%" and not self.starts_value(1):
                self.place += 1
                value = _bounded(value / 100)
            elif self.take("!"):
                value = _factorial(value)
            else:
                return value

    def starts_value(self, ahead: int) -> bool:
        return self.tokens[min(self.place + ahead, len(self.tokens) - 1)].kind in ("number", "(", "name")

    def atom(self) -> Fraction:
        if token := self.take("number"):
            return token.value
        if self.take("("):
            return self.closed()[0]
        if token := self.take("name"):
            if token.value == "pi":
                return Fraction("3.14159265358979323846")
            if self.take("("):
                return _function(token.value, self.closed(several=True))
            return _function(token.value, [self.power()])
        self.refuse()

    def closed(self, several: bool = False) -> list[Fraction]:
        values = [self.sum()]
        while several and self.take(","):
            values.append(self.sum())
        if not self.take(")"):
            if self.next.kind == "end":
                raise CalculatorError("a parenthesis is not closed")
            self.refuse()
        return values


# ------------------------------------------------------------------------------------------------------- reckoning
def _multiplied(kind: str, a: Fraction, b: Fraction) -> Fraction:
    if kind == "*":
        return _bounded(a * b)
    if b == 0:
        raise CalculatorError("a division by zero")
    return _bounded({"/": a.__truediv__, "//": a.__floordiv__, "%": a.__mod__}[kind](b) + Fraction(0))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        return _root(base, exponent)
    n = exponent.numerator
    if base == 0 and n < 0:
        raise CalculatorError("zero to a negative power is a division by zero")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(base) != 1 and base != 0 and (bits - 1) * abs(n) > LARGEST_BITS:
        raise CalculatorError(f"a number of more than {int(LARGEST_BITS * math.log10(2))} digits")
    return _bounded(base ** (n if abs(base) != 1 else n % 2))


def _root(base: Fraction, exponent: Fraction) -> Fraction:
    """A fractional power: exact when it is rational, else rounded to 40 digits after its integer part."""
    if base < 0:
        raise CalculatorError("a root of a negative number")
    if base == 0:
        if exponent < 0:
            raise CalculatorError("zero to a negative power is a division by zero")
        return base
    with decimal.localcontext() as context:
        context.prec = ROOT_DIGITS
        exact = decimal.Decimal(exponent.numerator) / decimal.Decimal(exponent.denominator)
        bits = abs(exact) * max(base.numerator.bit_length(), base.denominator.bit_length())
        if bits > LARGEST_BITS:
            raise CalculatorError(f"a number of more than {int(LARGEST_BITS * math.log10(2))} digits")
        context.prec = ROOT_DIGITS + int(bits) // 3
        exact = decimal.Decimal(exponent.numerator) / decimal.Decimal(exponent.denominator)
        value = (decimal.Decimal(base.numerator) / decimal.Decimal(base.denominator)) ** exact
    near = Fraction(value).limit_denominator(10**9)
    if abs(exponent.denominator) <= 64 and _is_power(near, exponent.denominator, base, exponent.numerator):
        return near
    return _bounded(Fraction(value))


def _is_power(value: Fraction, n: int, base: Fraction, m: int) -> bool:
    """Whether value^n = base^m, where both sides are small enough to be computed."""
    if abs(m) * base.numerator.bit_length() > 4 * LARGEST_BITS or value == 0:
        return False
    if n * max(value.numerator.bit_length(), value.denominator.bit_length()) > 4 * LARGEST_BITS:
        return False
    return value**n == base**m


def _factorial(value: Fraction) -> Fraction:
    if value.denominator != 1 or not 0 <= value <= LARGEST_FACTORIAL:
        raise CalculatorError(f"the factorial of something other than an integer from 0 to {LARGEST_FACTORIAL}")
    return Fraction(math.factorial(value.numerator))


def _function(name: str, values: list[Fraction]) -> Fraction:
    if name in ("min", "max"):
        if len(values) == 1:  # max(1,200) has read 1,200 as one number
            shown = format_value(values[0])[:20]
            raise CalculatorError(f"{name} of the one value {shown}: it takes several, a space after each comma")
        return min(values) if name == "min" else max(values)
    if name == "round" and len(values) == 2 and values[1].denominator == 1 and abs(values[1]) <= EXACT_DIGITS:
        step = Fraction(10) ** values[1].numerator
        return _half_away(values[0] * step) / step
    if len(values) != 1:
        raise CalculatorError(f"{name} takes one value, not {len(values)}")
    (value,) = values
    if name == "sqrt":
        return _root(value, Fraction(1, 2))
    return Fraction({"abs": abs, "floor": math.floor, "ceil": math.ceil, "round": _half_away}[name](value))


def _half_away(value: Fraction) -> Fraction:
    """Rounded as people do: a half goes away from zero."""
    return Fraction(math.floor(abs(value) + Fraction(1, 2))) * (1 if value >= 0 else -1)
