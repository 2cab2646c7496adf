"""Pair the tensors of a state dict with a network's variables, by the name map that pairs most. A common prefix is ignored."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from hast_jax.networks import keras_files
from hast_jax.networks.flax_trees import COLLECTIONS
from hast_jax.networks.names import Path

MAX_PREFIXES = 8  # nested wrappers around a network, at most
MOST = 0.9  # share of missing names; above it, a message counts them instead of listing them


class Fit(NamedTuple):
    """How the names in a file fit those in a network.

    pairs: name in the file -> name in the network. missing: names that only the network has. unknown: names that only the file
    has. prefix: of most names in the file; it is removed before the names are compared.
    """

    pairs: dict[str, str]
    missing: list[str]
    unknown: list[str]
    prefix: str


def best(found: Collection[str], maps: Collection[Mapping[str, Path]]) -> tuple[Fit, Mapping[str, Path]]:
    """The fit with the most pairs, and its map. Of equal fits, the one with the shortest prefix wins, then the first map.

    found: the names in the file. maps: for each library, its name of each variable -> path of the variable.
    """
    fits = [(_fit(found, names, prefix), names) for prefix in _prefixes(found) for names in maps]
    return max(fits, key=lambda each: len(each[0].pairs))


def faults(fit: Fit, translatable: bool) -> list[str]:
    """One clause of an error message for each missing or unknown tensor, or one for all if nearly all are missing.

    translatable: whether a function of the user could translate the names.
    """
    wanted = len(fit.missing) + len(fit.pairs)
    if len(fit.missing) > MOST * wanted:
        if not fit.unknown:
            return [f"{len(fit.missing)} of its {wanted} tensors are missing, such as {fit.missing[0]}"]
        advice = " (a function in teacher.names can translate the names in a file)" if translatable else ""
        return [
            f"{len(fit.missing)} of its {wanted} tensors are missing and {len(fit.unknown)} others are unknown, because the "
            f"network's names are like {fit.missing[0]} and the names in the weights like {fit.unknown[0]}{advice}"
        ]
    unknown = [f"{name} is unknown" for name in fit.unknown]
    if unknown and not fit.missing:
        unknown[0] += " (leave out the weights of parts that the network uses in training alone)"
    return [f"{name} is missing" for name in fit.missing] + unknown


def is_flax(name: str) -> bool:
    """Whether `name` is one of Flax, so that its array is in Flax's layout."""
    return bool(_split(name)[0]) or re.split(r"[./]", name)[-1] == "kernel"


def _fit(found: Collection[str], names: Mapping[str, Path], prefix: str) -> Fit:
    bare = {_without(prefix, name): name for name in found}
    numbered = keras_files.resolve(bare, names)
    pairs = {original: numbered.get(name, name) for name, original in bare.items() if numbered.get(name, name) in names}
    return Fit(pairs, sorted(names.keys() - set(pairs.values())), sorted(set(found) - pairs.keys()), prefix)


def _prefixes(names: Collection[str]) -> Iterator[str]:
    """The empty prefix, and each chain of whole modules with which most names begin (names of Flax: behind the collection)."""
    yield ""
    rests = sorted(_split(name)[1] for name in names)
    middle = rests[len(rests) // 2] if rests else ""  # what most names share, this one has
    ends = [end for end, character in enumerate(middle, start=1) if character in "./"]
    for end in ends[:MAX_PREFIXES]:
        if 2 * sum(rest.startswith(middle[:end]) for rest in rests) > len(rests):
            yield middle[:end]


def _without(prefix: str, name: str) -> str:
    collection, rest = _split(name)
    return collection + rest.removeprefix(prefix)


def _split(name: str) -> tuple[str, str]:
    """ "params/net/conv/kernel" -> ("params/", "net/conv/kernel"); the first is empty for a name of another library."""
    begins = (f"{each}{separator}" for each in COLLECTIONS for separator in "/.")
    collection = next((begin for begin in begins if name.startswith(begin)), "")
    return collection, name.removeprefix(collection)
