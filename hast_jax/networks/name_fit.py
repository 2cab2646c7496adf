"""Which tensor of a state dict is which variable of a network: the name map that fits best, behind any common prefix."""

import itertools
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from hast_jax.networks import keras_files
from hast_jax.networks.flax_trees import COLLECTIONS
from hast_jax.networks.names import Path

MAX_PREFIXES = 8  # wrappers around a network
MOST = 0.9  # missing names, of which it is said how many there are rather than which


class Fit(NamedTuple):
    """What fits what.

    pairs: name in the file -> name in the network. missing, unknown: names of the network and of the file without the other.
    prefix: what every name in the file has in front.
    """

    pairs: dict[str, str]
    missing: list[str]
    unknown: list[str]
    prefix: str


def best(found: Collection[str], maps: Collection[Mapping[str, Path]]) -> tuple[Fit, Mapping[str, Path]]:
    """The fit with the most pairs, and its map; of equals that with the shortest prefix, and then the first of `maps`.

    found: the names in the file. maps: of each library, its names of the network's variables.
    """
    fits = [(_fit(found, names, prefix), names) for prefix in _prefixes(found) for names in maps]
    return max(fits, key=lambda each: len(each[0].pairs))


def faults(fit: Fit) -> list[str]:
    """A clause for each tensor that is missing or unknown; one for all where that is nearly every one."""
    wanted = len(fit.missing) + len(fit.pairs)
    if len(fit.missing) > MOST * wanted:
        if not fit.unknown:
            return [f"{len(fit.missing)} of its {wanted} tensors are missing, such as {fit.missing[0]}"]
        return [
            f"{len(fit.missing)} of its {wanted} tensors are missing and {len(fit.unknown)} others unknown, as its names are "
            f"like {fit.missing[0]} and the file's like {fit.unknown[0]} (state_dict_names of its class says which is which)"
        ]
    return [f"{name} is missing" for name in fit.missing] + [f"{name} is unknown" for name in fit.unknown]


def is_flax(name: str) -> bool:
    """Whether it is a name of Flax, whose array is in Flax's layout."""
    return bool(_split(name)[0])


def _fit(found: Collection[str], names: Mapping[str, Path], prefix: str) -> Fit:
    bare = {_without(prefix, name): name for name in found}
    numbered = keras_files.resolve(bare, names)
    pairs = {original: numbered.get(name, name) for name, original in bare.items() if numbered.get(name, name) in names}
    return Fit(pairs, sorted(names.keys() - set(pairs.values())), sorted(set(found) - pairs.keys()), prefix)


def _prefixes(names: Collection[str]) -> Iterator[str]:
    """The empty one, and each chain of whole modules that all names share, behind the collection in those of Flax."""
    yield ""
    rests = [_split(name)[1] for name in names]
    first, last = min(rests, default=""), max(rests, default="")  # what these two share, all share
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last))
    ends = [end for end, (character, _) in enumerate(same, start=1) if character in "./"]
    yield from (first[:end] for end in ends[:MAX_PREFIXES])


def _without(prefix: str, name: str) -> str:
    collection, rest = _split(name)
    return collection + rest.removeprefix(prefix)


def _split(name: str) -> tuple[str, str]:
    """ "params/net/conv/kernel" -> ("params/", "net/conv/kernel"); the first is empty for a name of another library."""
    collection = next((f"{each}/" for each in COLLECTIONS if name.startswith(f"{each}/")), "")
    return collection, name.removeprefix(collection)
