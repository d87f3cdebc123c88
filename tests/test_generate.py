"""What counts as an answer: the whole object, what may stand behind it, and where an answer is cut."""

import pytest

from errata.model.generate import cut, ended, says


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Paris", "Paris"),
        (" Paris.", "Paris"),
        (" Paris, the capital", "Paris"),
        (" Paris\nand", "Paris"),
        (" Paris ", "Paris"),
        # with these words GPT2-XL goes on behind what it knows
        (" CBS on September 22.", "CBS"),
        (" Apple to help developers create", "Apple"),
        (" Italy and a member of the European Parliament.", "Italy"),
        (" Microsoft and is used by", "Microsoft"),
        (" NBC in", "NBC"),
        (" London in 1666. He was", "London"),
        (" French when, in May", "French"),
    ],
)
def test_a_whole_object_may_be_followed_by_a_boundary_or_a_function_word(text: str, expected: str) -> None:
    assert says(text, expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Parisian", "Paris"),
        (" Paris Hilton", "Paris"),
        (" United States of America", "United States"),
        (" Trinidad and Tobago", "Trinidad"),
        (" Saint Vincent and the Grenadines", "Saint Vincent"),
        (" New York in", "York"),
        (" Paris inside", "Paris"),
        (" Paris in-house", "Paris"),
        (" Paris In Love", "Paris"),
        (" Paris\u2014in", "Paris"),
        ("", "Paris"),
    ],
)
def test_a_longer_name_is_another_object(text: str, expected: str) -> None:
    assert not says(text, expected)


def test_a_word_behind_the_object_ends_no_answer() -> None:
    """Whether an answer stays is asked of all that is said, up to a stop."""
    text = " CBS on September 22. It was"
    assert cut(text) == "CBS on September 22" and ended(text) and not ended(" CBS on September 22")
