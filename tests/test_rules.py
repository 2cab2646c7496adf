"""Bits by layer: the last rule that matches a layer's path gives them, and what is no rule is refused in one sentence."""

import pytest

from hast_jax.errors import UserError
from hast_jax.networks.rules import bits_of, normalise, parse_rules


@pytest.mark.parametrize("bits", ["w4a4", "W4A4", (4, 4), [4, 4], {"default": "w4a4"}, {"default": (4, 4)}, {"default": 4}])
def test_bits_without_patterns_are_those_of_all_layers(bits) -> None:
    rules = normalise(bits)
    assert bits_of(rules, ("stage1_unit1", "conv1")) == (4, 4)
    assert bits_of(rules, ()) == (4, 4)
    assert hash(rules) == hash(normalise("w4a4"))


def test_a_dict_gives_bits_by_pattern() -> None:
    rules = normalise({"default": (3, 3), "init_block|output": (8, 8), "stem": None, "head": (8, None), "tail": 5, "x": "w8"})
    found = {name: bits_of(rules, (name, "conv")) for name in ("init_block", "output", "stem", "head", "tail", "x", "other")}
    assert found == {
        "init_block": (8, 8),
        "output": (8, 8),
        "stem": (None, None),
        "head": (8, None),
        "tail": (5, 5),
        "x": (8, None),
        "other": (3, 3),
    }


def test_the_last_rule_that_matches_wins_and_the_default_is_the_first_wherever_it_stands() -> None:
    rules = normalise({"block": 8, "block/conv2": 4, "default": 3})
    assert [bits_of(rules, path) for path in (("block", "conv1"), ("block", "conv2"), ("output",))] == [(8, 8), (4, 4), (3, 3)]
    assert bits_of(normalise({"default": 3, "block/conv2": 4, "block": 8}), ("block", "conv2")) == (8, 8)


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("block1", ("block1", "conv"), True),
        ("block1", ("net", "block1"), True),
        ("block1", ("block10", "conv"), False),
        ("block1", ("my_block1", "conv"), False),
        ("block.", ("block7", "conv"), True),
        ("a|b", ("b", "conv"), True),
        ("a|b", ("ab", "conv"), False),
        ("net/block1", ("net", "block1", "conv"), True),
        ("block[0-9]+/conv", ("net", "block12", "conv"), True),
        ("default", ("default", "conv"), False),
        ("(?i)BLOCK1", ("block1", "conv"), True),
        ("(?x) block1 # the first", ("block1", "conv"), True),
        (r"(\w)\1_conv", ("aa_conv",), True),
        (r"(\w)\1_conv", ("ab_conv",), False),
    ],
)
def test_a_pattern_matches_whole_names(pattern: str, path: tuple[str, ...], matches: bool) -> None:
    rules = normalise({"default": 3} | {pattern: 8 if pattern != "default" else 3})
    assert (bits_of(rules, path) == (8, 8)) == matches


def test_a_text_of_rules_is_read_in_its_order() -> None:
    text = "init_block|output=w8a8; head = w8;(?=x)y=full; a{1,2}=w2a8; mid=a4; last=w4a32;"
    rules = {"init_block|output": (8, 8), "head": (8, None), "(?=x)y": (None, None), "a{1,2}": (2, 8), "mid": (None, 4)}
    rules |= {"last": (4, None)}
    assert parse_rules(text) == rules and list(parse_rules(text)) == list(rules)
    assert parse_rules("") == {}
    assert bits_of(normalise({"default": (3, 3)} | rules), ("output",)) == (8, 8)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("output", "write PATTERN=BITS"),
        ("output=", "write w8a8"),
        ("output=8", "write w8a8"),
        ("output=W8A8B8", "write w8a8"),
        ("output=w8a8a8", "write w8a8"),
        ("output=w9a8", "between 2 and 8"),
        ("output=w8a1", "between 2 and 8"),
        ("output=w1", "between 2 and 8"),
        ("=w8a8", "pattern is empty"),
        ("(=w8a8", "no regular expression"),
        ("(?\n)=w8a8", "no regular expression"),
        ("a)(b=w8a8", "no regular expression"),
        ("a{99999999999999}=w8", "no regular expression"),
        ("a=w8; a=w4", "two rules"),
        ("default=w8", "the default is no rule"),
    ],
)
def test_a_text_that_is_no_rule_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        parse_rules(text)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (None, "are None"),
        (4.0, "are 4.0"),
        (True, "whole numbers"),
        ("", "write w8a8"),
        ("w4a9", "between 2 and 8"),
        ((4,), "no pair"),
        ((4, 4, 4), "no pair"),
        ((4, 9), "between 2 and 8"),
        ((1, 4), "between 2 and 8"),
        ((4.0, 4), "whole numbers"),
        ((True, 4), "whole numbers"),
        ((float("nan"), 4), "whole numbers"),
        (("4", 4), "whole numbers"),
        ({}, "give no default"),
        ({"output": 8}, "give no default"),
        ({"default": 3, "output": 9}, "between 2 and 8"),
        ({"default": 3, "output": True}, "whole numbers"),
        ({"default": 3, "output": {}}, "no pair"),
        ({"default": 3, "output": 2.5}, "no pair"),
        ({"default": 3, "(": 8}, "no regular expression"),
        ({"default": 3, "": 8}, "pattern is empty"),
        ({"default": 3, 1: 8}, "must be a text"),
    ],
)
def test_bits_that_are_none_are_refused(bits, words: str) -> None:
    with pytest.raises(UserError) as error:
        normalise(bits)
    assert words in str(error.value) and "\n" not in str(error.value)
