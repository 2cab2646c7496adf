"""The description of a config field, and rules for its value.

A rule is a function of a value that has the field's kind. It returns "" if the value is allowed, and otherwise words that say
what the value must be.
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

MOST = 2**31 - 1  # the largest count, because counters have 32 bits
MOST_FLOAT32, LEAST_FLOAT32 = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
MOST_SHOWN = 200  # characters of a wrong value in an error message

# Kind -> the types of its values (NumPy's numbers too), the words for one value, and the words for several values.
KINDS: dict[type, tuple[Any, str, str]] = {
    bool: (bool | np.bool_, "True or False", "True or False"),
    int: (numbers.Integral, "a whole number", "whole numbers"),
    float: (numbers.Real, "a number", "numbers"),
    str: (str, "a text", "texts"),
}


@dataclass(frozen=True)
class Field:
    """One field of the config.

    default: its type is the field's kind: bool, int, float, str, or a tuple whose elements have the type of the first one.
    help: the description in docs/configuration.md and --help.
    choices: texts that the help lists. If the field has no `rule`, its value must be one of them.
    free: whether the value may change when a run resumes. own: whether it may differ between the processes of one run.
    """

    default: Any
    help: str
    rule: Rule | None = None
    choices: tuple[str, ...] = ()
    free: bool = False
    own: bool = False

    def convert(self, value: Any) -> Any:
        """`value` converted to this field's kind. Raises TypeError if it is of another kind."""
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
        """Words that say what the value must be; "" if it is allowed."""
        try:
            value = self.convert(value)
        except TypeError:
            return self.kind()
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, float) and not abs(each) <= MOST_FLOAT32:
                return "finite, also in float32"
            if isinstance(each, float) and 0 < abs(each) < LEAST_FLOAT32:
                return f"0 or at least {LEAST_FLOAT32:.2g}, because float32 has nothing between them"
            if isinstance(each, str) and "\0" in each:
                return "a text without a zero character, which no path may have"
        rule = self.rule or (one_of(self.choices) if self.choices else None)
        return rule(value) if rule else ""


def _convert(kind: type, value: Any) -> Any:
    # Python takes True for 1, but nobody who writes True for a number means 1.
    if not isinstance(value, KINDS[kind][0]) or (kind is not bool and isinstance(value, bool)):
        raise TypeError
    try:
        return kind(value)
    except OverflowError:  # a whole number too large for a float
        return math.inf


def shown(value: Any) -> str:
    """A value as text for an error message, on one line and shortened to `MOST_SHOWN` characters."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python refuses to print a number of thousands of digits
        return "a huge number"
    return text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + "..."


def close(name: str, known: Iterable[str]) -> str:
    """The hint " (did you mean NAME?)" with the known name that is closest; "" if none is close."""
    names = {each.lower(): each for each in known}
    found = difflib.get_close_matches(name.lower(), names, 1)
    return f" (did you mean {names[found[0]]}?)" if found else ""


def one_of(choices: Iterable[str], also: Callable[[str], bool] = lambda value: False) -> Rule:
    """The rule that a text is one of `choices`, or that `also` is true for it."""
    known = list(choices)
    return lambda value: "" if value in known or also(value) else f"one of {', '.join(known)}{close(value, known)}"


def holds(condition: Callable[[Any], bool], words: str) -> Rule:
    """The rule that `condition` is true for the value. words: what the value must be."""
    return lambda value: "" if condition(value) else words


def between(low: float, high: float) -> Rule:
    """The rule that a number is from `low` to `high`, both included."""
    return holds(lambda value: low <= value <= high, f"between {low} and {high}")


def parsed_by(parse: Callable[[str], Any], words: str) -> Rule:
    """The rule that a text is empty, or that `parse` takes it without a UserError. words: what the text must be."""

    def rule(value: str) -> str:
        try:
            if value:
                parse(value)
        except UserError as error:
            return f"{words} ({str(error).rstrip('.')})"
        return ""

    return rule


def parse_json(text: str | bytes) -> Any:
    """The JSON value in a text. Raises ValueError if the text is anything else, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def json_object(text: str) -> dict[str, Any]:
    """The JSON object in a text. Raises UserError if the text is something else or holds a number that is not finite."""
    try:
        value = parse_json(text)
        json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise InputError(f"{error}.") from error
    if not isinstance(value, dict):
        raise InputError(f"it is {shown(value)}.")
    return value


positive = holds(lambda value: value > 0, "positive")
not_negative = holds(lambda value: value >= 0, "zero or positive")
count = holds(lambda value: 0 < value <= MOST, f"positive, and at most {MOST}")
count_or_zero = holds(lambda value: 0 <= value <= MOST, f"zero or positive, and at most {MOST}")
share = holds(lambda value: 0 < value <= 1, "above 0 and at most 1")
