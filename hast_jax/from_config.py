"""The networks that a config names: the teacher with its weights, and the student."""

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from hast_jax import config as config_lib
from hast_jax import networks, paths
from hast_jax.data.datasets import normalise
from hast_jax.errors import UserError, sentence
from hast_jax.fields import GIVEN
from hast_jax.method import quantizer
from hast_jax.networks import Network, rules, user_files, weights
from hast_jax.networks.linear import name_of

ROUNDING = 1e-6  # of a logit, however small all logits are
LOGITS_AGREE = 0.01  # as a share of the largest logit. Frameworks round differently; a wrong network differs by far more


def module(config: ConfigDict) -> nn.Module:
    """The Linen module that the config names, without variables."""
    arguments = json.loads(config.teacher.arguments or "{}")
    return networks.module(config.teacher.network, config.teacher.classes, arguments)


def own_code(config: ConfigDict) -> dict[str, str]:
    """Flag -> the user's code that the config names. A later command on the run folder must give this flag."""
    return {field: config.teacher[field] for field in ("network", "names") if user_files.is_own(config.teacher[field])}


def trust(
    config: ConfigDict, workdir: Path, network: str | None = None, names: str | None = None, weights_path: str | None = None
) -> None:
    """Put the code and the weights that the user names into the config of a run folder.

    network, names, weights_path: new values of `teacher.network`, `teacher.names` and `teacher.weights`. `teacher.check` is
    emptied. Raises UserError if the network was given in Python, if the weights are missing, or if the folder names code that
    the user does not name. This code may be a stranger's.
    """
    if config.teacher.network.endswith(GIVEN):
        raise UserError(
            f"the network of {workdir} was given in Python, so no command can make it: load the student in Python, with "
            f"student = hast_jax.load('{workdir}', model), for hast_jax.evaluate and hast_jax.export."
        )
    if weights_path is not None:
        config.teacher.weights = weights_path
    given = {field: value for field, value in {"network": network, "names": names}.items() if value is not None}
    for field, named in own_code(config).items():
        if field not in given:
            raise UserError(f"{workdir} names {named}, which is not built in: if you trust its code, add --{field}={named}.")
    config.teacher.update(given)
    config.teacher.check = ""  # it served the run's start, and its file may be gone
    known = config.teacher.weights
    if weights_path is None and known not in weights.BUILT_IN and not paths.local(known).exists():
        raise UserError(f"{workdir} was made with the weights {known}, which are not there: name them with --weights.")


def bare_teacher(config: ConfigDict, own: nn.Module | None = None) -> Network:
    """The full-precision network without its variables. own: a module to use instead of that of the config."""
    return _network(config, own, arithmetic=config.teacher.arithmetic)


def student(config: ConfigDict, own: nn.Module | None = None) -> Network:
    """The network with quantized weights and activations, without its variables. own: see `bare_teacher`."""
    return _network(
        config,
        own,
        rules=bit_rules(config),
        range_rule=quantizer.RANGE_RULES[config.calibration.range],
        learned_ranges=config.finetune.ranges == "learned",
        kernel_range_rule=quantizer.RANGE_RULES[config.calibration.kernel_range],
        straight_through=config.finetune.straight_through,
    )


def teacher(config: ConfigDict) -> tuple[Network, weights.Variables]:
    """The full-precision network and its variables.

    Raises UserError if the stages cannot quantize the network, or if a file does not fit the config.
    """
    network = bare_teacher(config)
    if not config.teacher.weights:
        raise UserError("config.teacher.weights is empty: give the file of the trained network's weights.")
    path = weights.locate(config.teacher.weights)
    state, metadata = weights.read(path)
    for field in ("teacher.mean", "teacher.std", "eval.crop"):
        name = field.split(".")[1]
        said, ours = getattr(metadata, name), config_lib.field(config, field)
        if said is not None and not (np.size(said) in (1, np.size(ours)) and np.allclose(said, ours, atol=1e-3)):
            raise UserError(
                f"{path} was trained for the {name} {said}, not config.{field} {ours}: change the weights, or the config."
            )
    names = user_files.load(config.teacher.names) if config.teacher.names else None
    if names is not None and not callable(names):
        raise UserError(f"config.teacher.names {config.teacher.names} is no function: it must give a name for each path.")
    variables = weights.from_state_dict(network.module, state, tuple(config.teacher.image), names, network.call)
    weights.check_collections(network.module, variables, tuple(config.teacher.image), network.call)
    if config.teacher.check:
        _compare(network, variables, paths.local(config.teacher.check), config)
    return network, variables


def _compare(network: Network, variables: weights.Variables, path: Path, config: ConfigDict) -> None:
    """Raise UserError if the network does not give the logits that another framework gave.

    path: of an .npz file with `images` [n, height, width, channels], uint8 or normalised, and `logits` [n, classes].
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            images, wanted = file["images"], file["logits"]
    except Exception as error:  # on a damaged file, NumPy and zipfile raise errors of many kinds
        raise UserError(
            f"config.teacher.check {path} cannot be read ({sentence(error)}): give an .npz file with images and logits."
        ) from error
    fits = images.ndim == 4 and images.shape[1:] == tuple(config.teacher.image)
    if not fits or not len(images) or wanted.shape != (len(images), network.classes):
        shapes = f"images {images.shape} and logits {wanted.shape}"
        expected = f"[n, {', '.join(map(str, config.teacher.image))}] and [n, {network.classes}]"
        raise UserError(f"config.teacher.check {path} holds {shapes}: they must be {expected}.")
    stored = images.dtype
    for what, dtype in (("images", stored), ("logits", wanted.dtype)):
        if not (np.issubdtype(dtype, np.floating) or (what == "images" and dtype == np.uint8)):
            raise UserError(f"config.teacher.check {path} holds {dtype} {what}: save logits as float32, and pixels as uint8.")
    brightest = float(np.abs(images).max())
    if stored == np.uint8:
        images = normalise(jnp.asarray(images), config.teacher.mean, config.teacher.std)
    found = networks.logits(network, variables, jnp.asarray(images, jnp.float32))
    largest, size = float(np.abs(np.asarray(found) - wanted).max()), float(np.abs(wanted).max())
    if not largest <= LOGITS_AGREE * size + ROUNDING:
        causes = "order of flattened features, padding, epsilon of batch norms"
        if stored == np.uint8:
            causes = f"teacher.mean and teacher.std, {causes}"
        elif brightest > 10 * max(max(mean, 1 - mean) / std for mean, std in zip(config.teacher.mean, config.teacher.std)):
            causes = f"the images, up to {brightest:.3g}, are not normalised: save them as uint8 or normalise them"
        raise UserError(
            f"the network does not give the logits of {path}: they differ by up to {largest:.3g}, and the largest logit is "
            f"{size:.3g}; see docs/your_network.md for what often differs ({causes})."
        )


def _network(config: ConfigDict, own: nn.Module | None, **settings: Any) -> Network:
    call = json.loads(config.teacher.call) if config.teacher.call else None
    network = networks.create(
        module(config) if own is None else own,
        tuple(config.teacher.image),
        call=call,
        branches=config.finetune.branches,
        fast_convolution=config.fast_convolution,
        **settings,
    )
    if network.classes != config.teacher.classes:
        name = name_of(network.module)
        wanted = config.teacher.classes
        raise UserError(
            f"{name} gives {network.classes} logits, not {wanted}: set config.teacher.classes to {network.classes}."
        )
    return network


def bit_rules(config: ConfigDict) -> rules.Rules:
    """The bits that the config gives to each layer."""
    full = rules.FULL_PRECISION
    default = tuple(None if bits == full else bits for bits in (config.bits.weights, config.bits.activations))
    return rules.normalise({"default": default, **rules.parse_rules(config.bits.rules)})
