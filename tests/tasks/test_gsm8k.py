"""Grading of GSM8K answers; the rows are our own."""

from decimal import Decimal

import pytest

from spo_jax.tasks.gsm8k import is_correct, last_number, marked_answer, read_number

GOLD = "She has 16 - 3 = <<16-3=13>>13 eggs.\nAt $2 each she makes 2 * 13 = $26.\n#### 26"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", "18"), ("18.", "18"), ("$1,234.50", "1234.5"), ("25%", "25"), ("-7", "-7"),
        (".5", "0.5"), ("+3", "3"), (" 4 ", "4"),
    ],
)  # fmt: skip
def test_numbers_as_they_are_written(text, number):
    assert read_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "abc", "1.2.3", "NaN", "Infinity", "-"])
def test_what_is_no_number(text):
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("solution", "strict", "flexible"),
    [
        ("#### 26", True, True),
        ("work 5\n#### $26.00", True, True),
        ("#### 26.", True, True),
        ("####26\nand 3 more", True, False),
        ("The answer is 26.", False, True),
        ("A: 26", False, True),
        ("2 * 13 = 26 dollars, or 25", False, False),
        ("#### 1,026", False, False),
        ("#### -26", False, False),
        ("#### twenty-six", False, False),
        ("", False, False),
    ],
)
def test_grading(solution, strict, flexible):
    assert is_correct(GOLD, solution) == strict
    assert is_correct(GOLD, solution, flexible=True) == flexible


def test_readings():
    assert marked_answer(GOLD) == last_number(GOLD) == 26
    assert marked_answer("no mark 3") is None
    assert last_number("no number") is None
    assert last_number("from 1,000 to 2,500.75 in all") == Decimal("2500.75")


def test_a_reference_without_its_mark_is_an_error():
    with pytest.raises(ValueError, match="'####'"):
        is_correct("The answer is 3", "#### 3")
