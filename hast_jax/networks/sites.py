"""Where the activations of a network are quantized, and with how many bits. Its structure and the rules decide."""

import warnings
from typing import NamedTuple

import flax.linen as nn

from hast_jax.errors import InputError, Notice
from hast_jax.networks.rules import Bits, Rules, bits_of, compiled
from hast_jax.networks.structure import Call, Path, Structure, name_of


class Site(NamedTuple):
    """A place where activations are quantized. name: the path of its range in the collection `ranges`."""

    name: Path
    bits: int


def sites(structure: Structure, rules: Rules) -> dict[Call, Site]:
    """The calls at which activations are quantized, each with its site. The first rule is the default.

    In a network with marks (`Activation`), the output of each mark is quantized. In a network without marks, the input of each
    layer is quantized, except the image. Another rule than the default also quantizes the input of each layer that it matches,
    even the image, unless the input is the output of a mark or selects from one.
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
        if bits is None or each.mark is not None:
            continue
        # Layers that read the same value with the same bits share a range, because the value is stored once.
        sites[each.call] = shared.setdefault((each.value, bits), Site(_site_name(each.call, ("input",)), bits))
    return sites


def _exception(rules: Rules, path: Path) -> Bits | None:
    """The bits that a rule other than the default gives the layer at `path`; None if no such rule matches."""
    return next((bits for pattern, bits in reversed(rules[1:]) if compiled(pattern).search("/".join(path))), None)


def _site_name(call: Call, kind: Path) -> Path:
    name = (*call.path, *kind)
    return (*name[:-1], f"{name[-1]}_{call.number + 1}") if call.number else name


def check_rules(module: nn.Module, structure: Structure, rules: Rules) -> None:
    """Raise InputError if a rule matches nothing, or if the rules quantize weights outside all layers.

    A notice says that weights in other collections than `params`, and constant arrays, stay in full precision.
    """
    paths = [layer.path for layer in structure.layers] + [call.path for call in structure.marks]
    for pattern, _ in rules[1:]:
        if not any(compiled(pattern).search("/".join(path)) for path in [*paths, *structure.variables]):
            more = f" and {len(paths) - 12} more" if len(paths) > 12 else ""
            names = ", ".join("/".join(path) for path in paths[:12]) + more
            raise InputError(f"the rule {pattern!r} names no layer of {name_of(module)}; there are: {names}.")
    if structure.constants:
        words = f"{name_of(module)} multiplies activations with arrays that are not among its variables"
        warnings.warn(f"{words}: these arrays stay in full precision.", Notice, stacklevel=2)
    for path in structure.others:
        if bits_of(rules, path)[0] is None:
            continue
        if path[0] in structure.collections:
            words = f"{name_of(module)} multiplies activations with {'/'.join(path)}, which stays in full precision."
            warnings.warn(words, Notice, stacklevel=2)
        else:
            raise InputError(
                f"{name_of(module)} has weights that nothing quantizes ({'/'.join(path)}), because they belong to no nn.Conv "
                "or nn.Dense, because slices of them multiply activations, or because nn.jit hides the layer: use such a layer "
                "without nn.jit, or leave the weights in full "
                f"precision with the rule {'/'.join(path)!r}: None."
            )
