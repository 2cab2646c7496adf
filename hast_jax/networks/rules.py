"""Bits by layer: which rule gives a layer its bits.

Rules are (pattern, bits) pairs. The last rule that matches wins. A pattern is a regular expression over whole names in a
layer's path, joined by slashes. `block1|output` matches ("block1", "conv") and ("output",), but not ("block10", "conv"). Bits
are the pair (weights, activations). None means full precision.
"""

import functools
import numbers
import re
from collections.abc import Mapping
from typing import Any

from hast_jax.errors import InputError
from hast_jax.kinds import shown
from hast_jax.method.quantizer import MAX_BITS, MIN_BITS

Bits = tuple[int | None, int | None]
Rules = tuple[tuple[str, Bits], ...]

FULL_PRECISION = 32  # the number of bits that means: not quantized
DEFAULT = "default"  # stands in place of a pattern for all layers that no pattern matches
ALL = ".*"
FORMS = "w8a8, w8 (activations in full precision), a8 or full"


def parse_rules(text: str) -> dict[str, Bits]:
    """Pattern -> bits of each rule in a text "PATTERN=BITS; PATTERN=BITS", in order. Raises UserError if it is malformed."""
    rules: dict[str, Bits] = {}
    for part in filter(None, map(str.strip, text.split(";"))):
        pattern, equals, bits = (word.strip() for word in part.rpartition("="))
        if not equals:
            raise InputError(f"the rule {shown(part)} has no bits: write PATTERN=BITS.")
        if pattern == DEFAULT:
            raise InputError("the default is no rule: bits.weights and bits.activations are for layers that no rule matches.")
        if pattern in rules:
            raise InputError(f"the pattern {shown(pattern)} has two rules: keep one.")
        compiled(pattern)
        rules[pattern] = _read(bits)
    return rules


def form(bits: Bits) -> str:
    """Bits as a rule gives them: w8a8, w8, a8 or full."""
    return "".join(f"{letter}{each}" for letter, each in zip("wa", bits) if each is not None) or "full"


def text_of(rules: Rules) -> str:
    """The text from which `parse_rules` reads these rules. The default must not be among them."""
    return "; ".join(f"{pattern}={form(bits)}" for pattern, bits in rules)


def normalise(bits: Any) -> Rules:
    """The rules for bits that a user wrote in Python. Raises UserError if the bits are malformed.

    bits: "w4a4"; a pair such as (4, 4); one number for both weights and activations; or a dict of patterns and these, such as
    {"default": (3, 3), "init_block|output": 8, "stem": None, "head": (8, None)}.
    """
    if isinstance(bits, str | tuple | list | numbers.Integral):
        return ((ALL, _bits(bits)),)
    if not isinstance(bits, Mapping):
        raise InputError(f'bits are {shown(bits)}: give "w4a4", a pair such as (4, 4), or a dict of patterns and bits.')
    if DEFAULT not in bits:
        raise InputError('bits give no default: add "default", with the bits of the layers that no pattern matches.')
    for pattern in bits:
        if not isinstance(pattern, str) or ";" in pattern:
            raise InputError(f"bits have the pattern {shown(pattern)}: it must be a text without a semicolon.")
        compiled(pattern)
    others = ((pattern, _bits(value)) for pattern, value in bits.items() if pattern != DEFAULT)
    return ((ALL, _bits(bits[DEFAULT])), *others)


def bits_of(rules: Rules, path: tuple[str, ...]) -> Bits:
    """The bits (weights, activations) of the layer at `path`; full precision if no rule matches."""
    name = "/".join(path)
    return next((bits for pattern, bits in reversed(rules) if compiled(pattern).search(name)), (None, None))


@functools.cache
def compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression that finds `pattern` as whole names in a path joined by slashes. Raises UserError if it is none."""
    if not pattern:
        raise InputError("a pattern is empty: write a regular expression over names of layers.")
    try:
        re.compile(pattern)  # on its own too, because "a)(b" is valid between parentheses
        flags = re.match(r"(?:\(\?[aimsux]+\))*", pattern)  # of the whole expression, such as (?i), at whose start they must be
        length = flags.end() if flags else 0
        end = "\n" if "x" in pattern[:length] else ""  # (?x) allows a comment, which a line break ends
        return re.compile(rf"{pattern[:length]}(?:^|/)(?:{pattern[length:]}{end})(?:/|$)")
    except (re.error, OverflowError, RecursionError) as error:
        words = " ".join(str(error).split())  # the message may quote a line break of the pattern
        raise InputError(f"the pattern {shown(pattern)} is no regular expression: {words}.") from error


def _bits(value: Any) -> Bits:
    if isinstance(value, str):
        return _read(value)
    if value is None or isinstance(value, numbers.Integral):
        value = (value, value)
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise InputError(f"the bits {shown(value)} are no pair: give (weights, activations), or a text: {FORMS}.")
    weights, activations = value
    return _checked(weights), _checked(activations)


def _read(text: str) -> Bits:
    """Bits from a text, one of the forms in `FORMS`, in small or capital letters."""
    found = re.fullmatch("(?:w([0-9]{1,3}))?(?:a([0-9]{1,3}))?", text, re.IGNORECASE)
    if text.lower() == "full":
        return None, None
    if not found or not text:
        raise InputError(f"the bits {shown(text)} are unknown: write {FORMS}.")
    weights, activations = (None if each is None else _checked(int(each)) for each in found.groups())
    return weights, activations


def _checked(bits: Any) -> int | None:
    whole = isinstance(bits, numbers.Integral) and not isinstance(bits, bool)
    if bits is None or (whole and bits == FULL_PRECISION):
        return None
    if not whole or not MIN_BITS <= bits <= MAX_BITS:
        raise InputError(
            f"the bits {shown(bits)} are impossible: they must be whole numbers between {MIN_BITS} and {MAX_BITS}, or "
            f"{FULL_PRECISION} for full precision."
        )
    return int(bits)
