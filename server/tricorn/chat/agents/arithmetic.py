"""Arithmetic as people write it, in exact fractions: 0.1 + 0.2 is 0.3, and 9^9^9 is refused, not tried.

By precedence climbing, and bounded: the length of a text bounds its nesting, and how large a power is shows beforehand.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Context, Decimal
from fractions import Fraction
from operator import add, mod, mul, sub, truediv
from typing import NamedTuple

from tricorn.chat import ToolError

MAX_CHARACTERS = 200  # nested at every one of them, an expression takes 400 frames of Python's 1000
MAX_BITS = 4096  # of a numerator or denominator: some 1200 digits

ROOTS = Context(prec=50, Emin=-1000, Emax=1000)  # what is not exact is computed to 50 digits …
SHOWN = Context(prec=15)  # … and shown to 15

SPELLINGS = {
    "multiplied by": "*",
    "divided by": "/",
    "to the power of": "^",
    "square root of": "sqrt",
    "squared": "^2",
    "cubed": "^3",
    "plus": "+",
    "minus": "-",
    "times": "*",
    "over": "/",
    "percent": "%",
    "of": "*",
    "**": "^",
    "×": "*",
    "·": "*",
    "÷": "/",
    "−": "-",
    "²": "^2",
    "³": "^3",
    "√": "sqrt",
}
SPELLING = re.compile("|".join(map(re.escape, SPELLINGS)))
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
TOKEN = re.compile(r"\d+\.?\d*|\.\d+|sqrt|\S")
BEGINS_A_VALUE = re.compile(r"\.?\d|\(|sqrt").match

EXPRESSION = rf"(?=\D*\d)(?:[\d\s.,()+*/^%=-]|sqrt|{SPELLING.pattern})++"
"""A pattern for a text that is an expression rather than a sentence. It takes what it can and never backtracks."""


class Operator(NamedTuple):
    binding: int
    right: int  # how tightly an operator on its right side must bind to be taken first
    apply: Callable[[Fraction, Fraction], Fraction]


def evaluate(expression: str) -> Fraction:
    """The value of `expression`, with the precedence that Python has.

    Raises `ToolError` where it has no value, or one that is too large.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ToolError(f"I calculate with {MAX_CHARACTERS} characters at most.")
    plain = SPELLING.sub(lambda found: SPELLINGS[found[0]], THOUSANDS.sub("", expression.lower()))
    tokens = ["", *reversed(TOKEN.findall(plain))]  # a stack, the empty token at its bottom is the end
    try:
        value = climb(tokens, 0)
    except ZeroDivisionError:
        raise ToolError("Nothing can be divided by zero.") from None
    except ArithmeticError:
        raise ToolError("That is too large for me.") from None
    if tokens[-1]:
        raise ToolError(f"I expected an operator in place of “{tokens[-1]}”.")
    return value


def climb(tokens: list[str], floor: int) -> Fraction:
    """Take one value off `tokens`, and all that operators binding tighter than `floor` make of it."""
    left = operand(tokens)
    while (operator := OPERATORS.get(tokens[-1])) and operator.binding > floor:
        tokens.pop()
        left = operator.apply(left, climb(tokens, operator.right))
        if max(left.numerator.bit_length(), left.denominator.bit_length()) > MAX_BITS:
            raise OverflowError
    return left


def operand(tokens: list[str]) -> Fraction:
    token = tokens.pop()
    if token in SIGNS:
        return SIGNS[token] * climb(tokens, SIGN_BINDING)
    if token == "(":
        value = climb(tokens, 0)
        if tokens.pop() != ")":
            raise ToolError("A closing parenthesis is missing.")
    elif token == "sqrt":
        value = power(operand(tokens), Fraction(1, 2))
    elif BEGINS_A_VALUE(token):
        value = Fraction(token)
    else:
        raise ToolError(f"I expected a number in place of “{token}”." if token else "That calculation ends too early.")
    # A percentage; with another value behind it, % is the remainder.
    while tokens[-1] == "%" and not BEGINS_A_VALUE(tokens[-2]):
        tokens.pop()
        value /= 100
    return value


def power(base: Fraction, exponent: Fraction) -> Fraction:
    """Exact for a whole exponent."""
    if exponent < 0:
        return 1 / power(base, -exponent)
    if exponent.denominator == 1:
        doublings = max(base.numerator.bit_length(), base.denominator.bit_length()) - 1
        if doublings * exponent > MAX_BITS:
            raise OverflowError
        return base ** int(exponent)
    if base < 0:
        raise ToolError("A negative number has no such root among the real numbers.")
    return Fraction(ROOTS.power(decimal(base, ROOTS), decimal(exponent, ROOTS)))


def decimal(value: Fraction, context: Context) -> Decimal:
    return context.divide(Decimal(value.numerator), Decimal(value.denominator))


def show(value: Fraction) -> tuple[str, str]:
    """The sign to put before `value`, = or ≈, and its digits: all of a whole number, else 15."""
    if value.denominator == 1:
        return "=", str(value.numerator)
    shown = decimal(value, SHOWN)
    digits = f"{shown:f}" if -7 <= shown.adjusted() < SHOWN.prec else str(shown)
    return ("=" if Fraction(shown) == value else "≈"), digits


SIGNS = {"+": 1, "-": -1}
SIGN_BINDING = 3  # tighter than a product, looser than a power: -2^2 is -4
OPERATORS = {
    "+": Operator(1, 1, add),
    "-": Operator(1, 1, sub),
    "*": Operator(2, 2, mul),
    "/": Operator(2, 2, truediv),
    "%": Operator(2, 2, mod),
    "^": Operator(4, 3, power),  # from right to left, and 2^-1 is a half
}
