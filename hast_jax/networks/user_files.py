"""Networks of one's own: loading them from a file, and checking that they are what the stages need.

See docs/your_network.md for what such a network is.
"""

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from hast_jax.errors import UserError
from hast_jax.networks.layers import Conv, Dense, Taps

# Layers of Flax whose kernels stay in full precision, as nothing quantizes them.
NOT_QUANTIZED = (nn.Conv, nn.ConvLocal, nn.ConvTranspose, nn.Dense, nn.DenseGeneral, nn.Einsum)


def is_own(name: str) -> bool:
    """Whether a network's name is of the form FILE.py:CLASS."""
    return name.rpartition(":")[0].endswith(".py")


@functools.cache  # one class for teacher and student
def load(name: str) -> Any:
    """The class that "FILE.py:CLASS" names. Runs the file's code. Raises UserError where there is none."""
    file, _, attribute = name.rpartition(":")
    path = Path(file)
    # Python would load .pyc and .so files too, whose names `is_own` does not know.
    if not (is_own(name) and path.is_file()):
        raise UserError(f"the network {name!r} is not known and there is no file {file!r}: give FILE.py:CLASS.")
    spec: Any = importlib.util.spec_from_file_location(f"{path.stem} of hast_jax", path)  # a name that no import has
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look annotations up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does wrong
        raise UserError(f"{path} cannot be imported: {type(error).__name__}: {error}.") from error
    found = getattr(module, attribute, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UserError(f"{path} has no class {attribute!r} that is a flax.linen.Module.")
    for field in ("classes", "precision"):
        if field not in found.__dataclass_fields__:
            raise UserError(f"{name} has no field {field!r}: a network takes `classes: int` and `precision: Precision`.")
    return found


def check(teacher: nn.Module, student: nn.Module, image: tuple[int, int, int], alignment: bool) -> None:
    """Raise UserError, with the reason, where the stages cannot work on this network.

    image: height, width, channels. alignment: whether the student's branches are to be aligned. Nothing is computed.
    """
    called: list[nn.Module] = []

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__":
            called.append(context.module)
        return call(*args, **kwargs)

    images = jax.ShapeDtypeStruct((2, *image), jnp.float32)
    with nn.intercept_methods(note):
        output, variables = _trace(student, images)
    if not (isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], Taps)):
        raise UserError(f"{_name(teacher)} must return (logits, Taps).")
    logits, taps = output
    wanted = (2, teacher.classes)  # type: ignore[attr-defined]
    if getattr(logits, "shape", None) != wanted:
        raise UserError(f"{_name(teacher)} gives logits {getattr(logits, 'shape', None)} for two images, not {wanted}.")
    norms = len({module.path for module in called if isinstance(module, nn.BatchNorm)})
    if not taps.batch_norms:
        raise UserError(f"{_name(teacher)} has no batch norm in its Taps: images are made from batch-norm statistics alone.")
    if norms > len(taps.batch_norms):
        raise UserError(
            f"{_name(teacher)} has {norms} batch norms but returns {len(taps.batch_norms)} taps of them: return each one's."
        )
    plain = sorted({"/".join(module.path) for module in called if isinstance(module, NOT_QUANTIZED)})
    if plain:
        raise UserError(
            f"{_name(teacher)} has layers that nothing quantizes ({', '.join(plain)}): "
            "use Conv and Dense of hast_jax.models.layers."
        )
    quantized = {module.path for module in called if isinstance(module, Conv | Dense) and module.bits is not None}
    matrices = {path for path, leaf in flatten_dict(variables["params"]).items() if leaf.ndim > 1}
    floating = sorted("/".join(path) for path in matrices if path[:-1] not in quantized)
    if floating:
        raise UserError(
            f"{_name(teacher)} has weights that nothing quantizes ({', '.join(floating)}): they must be those "
            "of Conv and Dense of hast_jax.models.layers, with bits=self.precision.weights."
        )
    if not variables.get("ranges"):
        raise UserError(f"{_name(teacher)} has no activation to quantize: use Activation of hast_jax.models.layers.")
    if any(branch.ndim != 4 for branch in taps.branches):
        shapes = ", ".join(str(branch.shape) for branch in taps.branches if branch.ndim != 4)
        raise UserError(f"{_name(teacher)} has branches {shapes}: they must be feature maps [batch, height, width, channels].")
    if alignment and not taps.branches:
        raise UserError(f"{_name(teacher)} has no branches in its Taps to align: return some, or set --config.finetune.lam=0.")


def _trace(network: nn.Module, images: jax.ShapeDtypeStruct) -> tuple[Any, Any]:
    """Shapes of the output and of the variables."""
    try:
        return jax.eval_shape(network.init_with_output, jax.random.key(0), images)
    except UserError:
        raise
    except Exception as error:  # whatever the network does wrong
        words = str(error).split("\n")[0]
        raise UserError(f"{_name(network)} fails on images {images.shape}: {type(error).__name__}: {words}.") from error


def _name(network: nn.Module) -> str:
    return type(network).__name__
