"""Where the activations of a network are quantized, and with how many bits, by its structure and the rules."""

from typing import NamedTuple

import flax.linen as nn

from hast_jax.errors import InputError
from hast_jax.networks.rules import Bits, Rules, bits_of, compiled
from hast_jax.networks.structure import Call, Path, Structure, name_of


class Site(NamedTuple):
    """Where activations are quantized. name: the path of its range in the collection `ranges`."""

    name: Path
    bits: int


def sites(structure: Structure, rules: Rules) -> dict[Call, Site]:
    """Where activations are quantized.

    With marks: the output of each mark. Without: the input of each layer but for the image. A rule that names a layer
    quantizes its input too, the image included, unless that is the output of a mark. The first rule is the default.
    """
    sites: dict[Call, Site] = {}
    for call in structure.marks:
        bits = bits_of(rules, call.path)[1]
        if bits is not None:
            sites[call] = Site(_site_name(call, ()), bits)
    shared: dict[tuple[int, int], Site] = {}
    for each in structure.inputs:
        exception = _exception(rules, each.call.path)
        by_default = not structure.marks and not each.image
        bits = exception[1] if exception else bits_of(rules, each.call.path)[1] if by_default else None
        if bits is None or each.marked:
            continue
        # Layers that read the same values share their range: what they read is stored once.
        sites[each.call] = shared.setdefault((each.value, bits), Site(_site_name(each.call, ("input",)), bits))
    return sites


def _exception(rules: Rules, path: Path) -> Bits | None:
    """The bits that a rule beside the default gives the layer at `path`; None where there is no such rule."""
    return next((bits for pattern, bits in reversed(rules[1:]) if compiled(pattern).search("/".join(path))), None)


def _site_name(call: Call, kind: Path) -> Path:
    name = (*call.path, *kind)
    return (*name[:-1], f"{name[-1]}_{call.number + 1}") if call.number else name


def check_rules(module: nn.Module, structure: Structure, rules: Rules) -> None:
    """Raise InputError for a rule that names no layer, and for weights that nothing quantizes and no rule leaves alone."""
    paths = [layer.path for layer in structure.layers] + [call.path for call in structure.marks]
    for pattern, _ in rules[1:]:
        if not any(compiled(pattern).search("/".join(path)) for path in [*paths, *structure.others]):
            names = ", ".join("/".join(path) for path in paths[:12]) + (", ..." if len(paths) > 12 else "")
            raise InputError(f"the rule {pattern!r} names no layer of {name_of(module)}; there are: {names}.")
    for path in structure.others:
        exception = _exception(rules, path)
        if exception is None or exception[0] is not None:
            raise InputError(
                f"{name_of(module)} has weights that nothing quantizes ({'/'.join(path)}), as they are not those of an nn.Conv "
                "or nn.Dense, or as nn.jit hides it: use such a layer, without nn.jit, or leave them in full precision with "
                f"the rule {'/'.join(path)!r}: None."
            )
