"""Whether a response contains the answers."""

from __future__ import annotations

import pytest

from opsdl.data.tasks import found


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("The number is 123.", ["123"], 1.0),
        ("It is 51234.", ["123"], 0.0),
        ("It is 1234.", ["123"], 0.0),
        ("It is 4123.", ["123"], 0.0),
        ("First 91234, then 1234.", ["1234"], 1.0),  # a wrong occurrence does not hide a right one
        ("a1b and a12b", ["1", "12"], 1.0),  # letters beside a number do not make it longer
        ("silver FOX", ["Silver fox"], 1.0),
        ("foxes", ["fox"], 1.0),  # words are substrings, as in RULER
        ("one and two", ["one", "two", "three", "four"], 0.5),
        ("a.c", ["abc"], 0.0),
        ("abc", ["a.c"], 0.0),  # an answer is text, not a pattern
        ("", ["7"], 0.0),
    ],
)
def test_found(text, answers, expected):
    assert found(text, answers) == expected


def test_found_needs_answers():
    with pytest.raises(ValueError, match="no answers"):
        found("text", [])
