"""The quantized network, the result of a run: it computes logits, and can be saved to a folder and loaded again."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from hast_jax import networks, paths
from hast_jax.data.datasets import as_array, normalise, warn_of_pixels
from hast_jax.errors import InputError, Notice, UserError
from hast_jax.kinds import parse_json
from hast_jax.method.quantizer import RANGE_RULES
from hast_jax.networks import Codes, Network, flax_trees, from_nnx, structure, weights
from hast_jax.networks import rules as rules_lib
from hast_jax.networks.linear import name_of
from hast_jax.networks.rules import Rules
from hast_jax.runs.files import crc32, write_bytes, write_json
from hast_jax.runs.run_folder import RunFolder

FORMAT = 1
WEIGHTS, DESCRIPTION = "student.safetensors", "student.json"


@dataclass(frozen=True, eq=False, repr=False)
class Student:
    """A quantized network.

    network: the module, and which of its kernels and activations are quantized. variables: `params` (float32, from which the
    codes are computed), `batch_stats`, `ranges` and the module's other collections. rules: the bits of each layer.
    image: height, width and channels. mean, std: of each channel, for images in [0, 1]. record: the content of `result.json`.
    """

    network: Network
    variables: Mapping[str, Any]
    rules: Rules
    image: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    record: Mapping[str, Any]

    def __repr__(self) -> str:
        """One line, because the arrays would fill a screen."""
        bits = ", ".join(f"{pattern}={rules_lib.form(each)}" for pattern, each in self.rules).removeprefix(f"{rules_lib.ALL}=")
        shape = " x ".join(map(str, self.image))
        return f"<Student of {name_of(self.network.module)}, images {shape}, bits {bits}>"

    def __call__(self, images: Any) -> jax.Array:
        """Logits float32 [n, classes] of images [n, height, width, channels].

        images: uint8 images of 0 ... 255, which are normalised by `mean` and `std`; or floating point images that are
        normalised already. Raises InputError for other images. Warns if floating point images look like pixels.
        """
        images = as_array("images", images) if not isinstance(images, jax.Array) else images
        if images.ndim != 4 or images.shape[1:] != self.image:
            raise InputError(
                f"the images have the shape {images.shape}: the student takes [n, {', '.join(map(str, self.image))}]."
            )
        if images.dtype == jnp.uint8:
            images = normalise(jnp.asarray(images), self.mean, self.std)
        elif not jnp.issubdtype(images.dtype, jnp.floating):
            raise InputError(f"the images are {images.dtype}: give uint8 images, or floating point ones that are normalised.")
        elif not isinstance(images, jax.core.Tracer):
            warn_of_pixels(images, self.mean, self.std)
        return self._logits(self.variables, jnp.asarray(images, jnp.float32))

    def __getstate__(self) -> dict[str, Any]:
        """Without the compiled function, which cannot be pickled."""
        return {name: value for name, value in self.__dict__.items() if name != "_logits"}

    @cached_property
    def _logits(self) -> Any:
        return jax.jit(partial(networks.logits, self.network))

    @property
    def params(self) -> Mapping[str, Any]:
        """The parameters that the student computes with: quantized kernels are on the grid of their codes."""
        return networks.quantized_params(self.network, self.variables["params"], self.variables["ranges"])

    def codes(self) -> dict[str, Codes]:
        """The integer form of each quantized kernel, by its path: {"codes", "scale", "zero_point", "bits", "axes"}.

        codes: int8, of the kernel's shape. scale S, zero_point Z: one for each output channel. A weight is (codes + Z) / S.
        axes: the kernel's axes that one output channel sums over.
        """
        return networks.kernel_codes(self.network, self.variables["params"], self.variables["ranges"])

    def save(self, folder: str | Path) -> None:
        """Write the student to a folder, as student.safetensors and student.json.

        Raises UserError if the files cannot be written.
        """
        path = paths.local(folder)
        flat = {"/".join(name): np.asarray(leaf) for name, leaf in flax_trees.leaves(dict(self.variables)).items()}
        description = {
            "format": FORMAT,
            "module": name_of(self.network.module),
            "rules": self.rules,
            "call": dict(self.network.call),
            "learned_ranges": self.network.learned_ranges,
            "straight_through": self.network.straight_through,
            "fast_convolution": self.network.fast_convolution,
            "program": [self.network.structure.program, jax.__version__],
            "image": self.image,
            "mean": self.mean,
            "std": self.std,
            "crc32": crc32(flat),
            "record": self.record,
        }
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_bytes(path / WEIGHTS, safetensors.numpy.save(flat))
            write_json(path / DESCRIPTION, description)
        except OSError as error:
            raise UserError(f"the student cannot be written to {path}: {error.strerror}; choose another folder.") from error


def load(folder: str | Path, model: nn.Module | nnx.Module | None = None) -> Student:
    """The student that `Student.save` wrote to a folder, or that of a run folder.

    model: the module that was quantized; for a built-in network it may be left out. Raises UserError if the folder holds no
    student, a damaged student, or a student of another network. Warns if the module computes something else than when the
    student was saved (compared within one version of JAX).
    """
    path = paths.local(folder)
    if not (path / DESCRIPTION).exists() and (RunFolder(path).student / DESCRIPTION).exists():
        path = RunFolder(path).student
    said, arrays = _read(path)
    image, call, rules, record, settings = (said[name] for name in ("image", "call", "rules", "record", "settings"))
    if model is None:
        name = record.get("network")
        if name not in networks.ARCHITECTURES:
            raise UserError(
                f"{path} holds a student of your own network {said['module']}: give its module, as in load(folder, model)."
            )
        model = networks.module(name, said["classes"], said["arguments"])
    module, _ = from_nnx.linen(model)
    structure.forget()
    network = networks.create(module, image, call=call, rules=rules, **settings)
    ranges = {f"ranges/{name}": ("ranges", *each) for name, each in network.range_names.items()}
    variables = unflatten_dict({ranges.get(name, tuple(name.split("/"))): jnp.asarray(each) for name, each in arrays.items()})
    variables.setdefault("ranges", {})
    expected = weights.abstract_collections(module, image, call)
    variables = {name: flax_trees.formed(expected.get(name), tree) for name, tree in variables.items()}
    checked = weights.from_variables(module, variables, image, call=call)
    found = {"/".join(name) for name in flatten_dict(variables["ranges"])}
    if found != network.range_names.keys():
        raise UserError(f"{path} holds a student of another network than {name_of(module)}: its ranges are of other layers.")
    program, version = said["program"]
    if network.structure.program != program and version == jax.__version__:
        warnings.warn(
            f"{path} holds a student of a network that computed something else than this {name_of(module)}: its code, or "
            "JAX's precision, was changed since.",
            Notice,
            stacklevel=2,
        )
    return Student(network, {**variables, **checked}, rules, image, said["mean"], said["std"], record)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The description and the arrays of a student. Raises UserError if they are missing or damaged."""
    try:
        said = parse_json((path / DESCRIPTION).read_text())
        (path / WEIGHTS).open("rb").close()  # safetensors calls a file that may not be read one that is missing
        arrays = safetensors.numpy.load_file(path / WEIGHTS)
        if said["format"] != FORMAT or crc32(arrays) != said["crc32"]:
            raise ValueError("its arrays are not those that were saved")
        (_, default), *others = said["rules"]
        record = dict(said["record"])
        calibration = record.get("config", {}).get("calibration", {})
        if record.get("network") in networks.ARCHITECTURES:
            teacher = record["config"]["teacher"]
            said |= {"classes": teacher["classes"], "arguments": json.loads(teacher["arguments"] or "{}")}
        said |= {
            "record": record,
            "call": dict(said["call"]),
            "rules": rules_lib.normalise({"default": tuple(default), **{pattern: tuple(bits) for pattern, bits in others}}),
            "program": said.get("program", (None, None)),  # version 0.2.0 had no program
            "settings": {
                "straight_through": said["straight_through"],
                "fast_convolution": said["fast_convolution"],
                "learned_ranges": said.get("learned_ranges", False),  # version 0.2.0 had no learned ranges
                "kernel_range_rule": RANGE_RULES[calibration.get("kernel_range", "minmax")],  # for the report
            },
            **{name: tuple(said[name]) for name in ("image", "mean", "std")},
        }
    except OSError as error:
        words = f"{path} holds no student ({error.strerror or error})"
        raise UserError(f"{words}: give what Student.save wrote, or a run folder.") from error
    except Exception as error:  # the readers raise many kinds of errors on damaged files
        words = f"{path} is damaged ({type(error).__name__}: {error})"
        raise UserError(f"{words}: save the student again, or repeat the command that made its run.") from error
    return said, arrays
