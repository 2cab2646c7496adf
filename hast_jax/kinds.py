"""What describes one field of the config, and what its value may be.

A rule is a function of a value that has the field's kind. It returns what the value must be instead, or "" where it may stay.
"""

import difflib
import json
import math
import numbers
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hast_jax.errors import InputError, UserError

Rule = Callable[[Any], str]

MOST = 2**31 - 1  # of whatever is counted: the counters are of 32 bits
MOST_FLOAT32 = float(np.finfo(np.float32).max)
MOST_SHOWN = 200  # characters of a wrong value in a sentence

# Kind -> what is taken for it (NumPy's numbers too), what one is called, and what several are called.
KINDS: dict[type, tuple[Any, str, str]] = {
    bool: (bool | np.bool_, "True or False", "True or False"),
    int: (numbers.Integral, "a whole number", "whole numbers"),
    float: (numbers.Real, "a number", "numbers"),
    str: (str, "a text", "texts"),
}


@dataclass(frozen=True)
class Field:
    """One field of the config.

    default: its type is the field's kind: bool, int, float, str, or a tuple of what its first element is.
    help: what the field is, for docs/configuration.md and --helpfull. choices: the texts that it may be, where it has no
    other rule.
    free: whether it may change when a run goes on. own: whether it may differ between the processes of one run.
    """

    default: Any
    help: str
    rule: Rule | None = None
    choices: tuple[str, ...] = ()
    free: bool = False
    own: bool = False

    def convert(self, value: Any) -> Any:
        """`value` as this field's kind. Raises TypeError where it is of another."""
        if not isinstance(self.default, tuple):
            return _convert(type(self.default), value)
        if not isinstance(value, tuple | list):
            raise TypeError
        return tuple(_convert(type(self.default[0]), each) for each in value)

    def kind(self) -> str:
        """The kind in words."""
        if isinstance(self.default, tuple):
            return f"a tuple of {KINDS[type(self.default[0])][2]}"
        return KINDS[type(self.default)][1]

    def fault(self, value: Any) -> str:
        """What the value must be instead, or "" where it may stay."""
        try:
            value = self.convert(value)
        except TypeError:
            return self.kind()
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, float) and not abs(each) <= MOST_FLOAT32:
                return "finite, also in float32"
            if isinstance(each, str) and "\0" in each:
                return "a text without a zero character, which no path may have"
        rule = self.rule or (one_of(self.choices) if self.choices else None)
        return rule(value) if rule else ""


def _convert(kind: type, value: Any) -> Any:
    # Python takes True for 1, which nobody means who writes it into a number.
    if not isinstance(value, KINDS[kind][0]) or (kind is not bool and isinstance(value, bool)):
        raise TypeError
    try:
        return kind(value)
    except OverflowError:  # a whole number beyond all floats
        return math.inf


def shown(value: Any) -> str:
    """A value in a sentence: on one line, and not too long."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes out no number of thousands of digits
        return "a huge number"
    return text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + "..."


def close(name: str, known: Iterable[str]) -> str:
    """The hint "(did you mean NAME?)", after a space; "" where nothing known is close."""
    found = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {found[0]}?)" if found else ""


def one_of(choices: Iterable[str], also: Callable[[str], bool] = lambda value: False) -> Rule:
    """The rule of texts that are one of `choices`, or for which `also` is true."""
    known = list(choices)
    return lambda value: "" if value in known or also(value) else f"one of {', '.join(known)}{close(value, known)}"


def holds(condition: Callable[[Any], bool], words: str) -> Rule:
    """The rule of values for which `condition` is true."""
    return lambda value: "" if condition(value) else words


def between(low: int, high: int) -> Rule:
    """The rule of numbers from `low` to `high`."""
    return holds(lambda value: low <= value <= high, f"between {low} and {high}")


def parsed_by(parse: Callable[[str], Any], words: str) -> Rule:
    """The rule of texts that are empty or that `parse` takes, without a UserError."""

    def rule(value: str) -> str:
        try:
            if value:
                parse(value)
        except UserError as error:
            return f"{words} ({str(error).rstrip('.')})"
        return ""

    return rule


def json_object(text: str) -> dict[str, Any]:
    """The JSON object in a text. Raises UserError where it is something else, or holds a number that is not finite."""
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{error}.") from error
    if not isinstance(value, dict):
        raise InputError(f"it is {shown(value)}.")
    return value


positive = holds(lambda value: value > 0, "positive")
not_negative = holds(lambda value: value >= 0, "zero or positive")
count = holds(lambda value: 0 < value <= MOST, f"positive, and at most {MOST}")
count_or_zero = holds(lambda value: 0 <= value <= MOST, f"zero or positive, and at most {MOST}")
share = holds(lambda value: 0 < value <= 1, "above 0 and at most 1")
