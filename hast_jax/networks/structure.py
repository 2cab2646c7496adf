"""What a Linen network consists of: its layers, what they read, its batch norms and its branches, found by tracing it once.

The network is any `flax.linen.Module` of `nn.Conv`, `nn.Dense`, `nn.DenseGeneral`, `nn.Einsum` and `nn.BatchNorm` with any
functions between them. The trace takes shapes alone; nothing is computed.
"""

import functools
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from hast_jax.errors import InputError, Notice, UserError
from hast_jax.networks import flax_trees, graph, refusals
from hast_jax.networks.branches import Call, branches
from hast_jax.networks.from_nnx import FromNnx
from hast_jax.networks.inference import advice
from hast_jax.networks.layers import Activation
from hast_jax.networks.linear import LINEAR, name_of, place, summed_axes
from hast_jax.networks.matrices import has_constant_factors, outside_layers
from hast_jax.networks.refusals import Kernel

Path = tuple[str, ...]

COLLECTION = "hast_jax"  # holds the values that intercepted calls record
WATCHED: Any = (*LINEAR, nn.BatchNorm, Activation, *refusals.KINDS)
_calls = itertools.count()
READ = ("inputs", "x")  # names of the argument that Flax's layers read


class Layer(NamedTuple):
    """A convolution or linear layer. axes: those axes of its kernel that one output channel sums over."""

    path: Path
    axes: tuple[int, ...]

    @property
    def kernel(self) -> Path:
        """Its path in `params`."""
        return (*self.path, "kernel")


class Input(NamedTuple):
    """What one call of a layer reads. value: the number of the value in the trace. image: whether no layer comes before.

    mark: the call of an `Activation` whose output it reads, as it is or after a selection such as max pooling; None if there is
    none.
    """

    call: Call
    value: int
    image: bool
    mark: Call | None


class Structure(NamedTuple):
    """A network, each part in the order of execution.

    marks: calls of `Activation`. norms: calls of batch norms. branches: calls of batch norms whose outputs end a branch.
    variables: paths of the variables outside of layers and batch norms, relative to `params`; in another collection a path
    begins with the collection's name. others: those of them that multiply activations. constants: whether constant arrays
    multiply activations. classes: the number of logits. collections: those of its variables. program: the checksum of what it
    computes (`graph.Graph`).
    """

    layers: tuple[Layer, ...]
    inputs: tuple[Input, ...]
    marks: tuple[Call, ...]
    norms: tuple[Call, ...]
    branches: tuple[Call, ...]
    variables: tuple[Path, ...]
    others: tuple[Path, ...]
    constants: bool
    classes: int
    collections: tuple[str, ...]
    program: int


def forget() -> None:
    """Forget the networks that `inspect` has seen. Between two calls in a notebook, the classes of their parts may change."""
    _inspect_once.cache_clear()


def inspect(module: nn.Module, image: tuple[int, ...], call: Mapping[str, Any]) -> Structure:
    """The structure of `module` for normalised images [batch, *image], called with the keyword arguments `call`.

    Raises UserError, with the reason, for a network that cannot be quantized without data.
    """
    key = module, tuple(image), tuple(sorted(call.items()))
    try:
        hash(key)
    except TypeError:  # a field or an argument has no hash, so the network is traced each time
        return _inspect(module, image, call)
    return _inspect_once(*key)


@functools.lru_cache(maxsize=16)
def _inspect_once(module: nn.Module, image: tuple[int, ...], call: tuple[tuple[str, Any], ...]) -> Structure:
    return _inspect(module, image, dict(call))


def _inspect(module: nn.Module, image: tuple[int, ...], call: Mapping[str, Any]) -> Structure:
    images = jax.ShapeDtypeStruct((2, *image), jnp.zeros(()).dtype)
    seen = _Seen(module)
    try:
        variables = nn.unbox(jax.eval_shape(lambda key, x: module.init(key, x, **call), jax.random.key(0), images))
        with nn.intercept_methods(seen.intercept):
            traced, (_, left) = graph.trace(lambda v, x: seen.look(v, x, call), variables, images)
    except UserError:
        raise
    except Exception as error:  # whatever the network does wrong
        words = str(error).strip().split("\n")[0].rstrip(".")
        advice = ""
        if type(module).__module__ == nn.jit.__module__:  # its arguments besides the images may be traced
            advice = "; give the network itself, without nn.jit or nn.remat around it"
        elif isinstance(module, FromNnx) and isinstance(error, jax.errors.JAXTypeError):
            advice = "; leave out nnx.jit, nnx.remat, nnx.scan and nnx.vmap around its layers, if there are any"
        raise InputError(
            f"{name_of(module)} fails on images {images.shape}: {type(error).__name__}: {words}{advice}."
        ) from error
    if not seen.layers:
        raise InputError(f"{name_of(module)} has no nn.Conv or nn.Dense: there is nothing to quantize.")
    refusals.refuse_collections(module, variables)
    refusals.refuse_products_of_activations(module, traced)
    refusals.refuse_miscompiled(module, traced)
    if not seen.norms:
        raise InputError(
            f"{name_of(module)} has no nn.BatchNorm: images are made from the statistics of batch norms, so a network "
            "without them (a transformer, a network with layer or group norm) cannot be quantized without data."
        )

    def value(call, name):
        return _value(module, left, call, name)

    inputs = {call: value(call, "input") for call in seen.calls}
    before = traced.upstream(value(call, "output") for call in seen.calls)
    marks = {value(call, "output"): call for call in seen.marks}
    norms = {value(call, "output"): call for call in seen.norms}
    leaves = flax_trees.leaves(variables)
    numbers = dict(zip(leaves, traced.inputs[:-1]))
    calls = Counter(call.path for call in seen.calls)
    for path, layer in seen.layers.items():
        leaf, number = leaves.get(("params", *layer.kernel)), numbers.get(("params", *layer.kernel))
        refusals.refuse_kernel(module, traced, Kernel(path, layer.axes, calls[path], leaf, number))
    kernels = {numbers[("params", *layer.kernel)] for layer in seen.layers.values()}
    owners = seen.layers.keys() | {call.path for call in seen.norms}
    others = outside_layers(traced, {numbers[path]: leaf.shape for path, leaf in leaves.items()}, kernels)
    return Structure(
        tuple(seen.layers.values()),
        tuple(Input(call, number, not before.get(number), marks.get(traced.origin(number))) for call, number in inputs.items()),
        tuple(seen.marks),
        tuple(seen.norms),
        branches(traced, norms, {value(call, "output") for call in seen.calls}, set(inputs.values()), seen.shapes),
        tuple(_outside(path) for path in numbers if path[1:-1] not in owners),
        tuple(_outside(path) for path, number in numbers.items() if number in others),
        has_constant_factors(traced, traced.inputs[:-1]),
        seen.classes,
        tuple(variables),
        traced.checksum,
    )


def mutable() -> list[str]:
    """The collections that intercepted calls may write to: `COLLECTION`, and one with a new name, which stays empty.

    `nn.jit` caches traces by the names of these collections. Without a new name, a student would run its teacher's trace.
    """
    return [COLLECTION, f"{COLLECTION}_{next(_calls)}"]


def logits_of(output: Any) -> Any:
    """The logits in a network's output: the array itself, the first element of a tuple or list, or the "logits" of a dict."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    return output[0] if isinstance(output, tuple | list) and output else output


def argument(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, Callable[[Any], tuple[Any, Any]]]:
    """The value that an intercepted call reads, and a function that gives the call's arguments with another value instead."""
    if arguments:
        return arguments[0], lambda x: ((x, *arguments[1:]), named)
    name = next(name for name in READ if name in named)
    return named[name], lambda x: ((), {**named, name: x})


def _outside(path: Path) -> Path:
    """How a rule names a variable: by its path in `params`, or else with its collection."""
    return path[1:] if path[0] == "params" else path


class _Seen:
    """The calls that a network made while it was traced."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.call: Mapping[str, Any] = {}
        self.layers: dict[Path, Layer] = {}
        self.calls: list[Call] = []
        self.marks: list[Call] = []
        self.norms: list[Call] = []
        self.shapes: dict[Call, tuple[int, ...]] = {}  # of the outputs of batch norms
        self.classes = 0
        self._counts: Counter[Path] = Counter()

    def look(self, variables: Any, images: jax.Array, call: Mapping[str, Any]) -> tuple[jax.Array, Any]:
        """The logits, and the values that the intercepted calls recorded."""
        self.call = call
        output, state = self.module.apply(variables, images, mutable=mutable(), **call)
        logits = logits_of(output)
        shape = getattr(logits, "shape", None)
        if shape is None or len(shape) != 2 or shape[0] != len(images):
            raise InputError(
                f"{name_of(self.module)} gives {shape or type(output).__name__} for two images, not logits (2, n): let it "
                'return the logits alone, first in a tuple, or as "logits" of a dict.'
            )
        if shape[1] < 2:
            raise InputError(
                f"{name_of(self.module)} gives one logit, whose softmax is always 1, so nothing can be learned: let it return "
                "two, as (0, logit)."
            )
        named = output["logits"] if isinstance(output, Mapping) else output
        rows = [each for each in jax.tree.leaves(named) if len(getattr(each, "shape", ())) == 2]  # others may be numbers, texts
        if len(rows) > 1:
            warnings.warn(
                f"{name_of(self.module)} gives {len(rows)} arrays with one row for each image; the logits are taken to be the "
                f"first, of {shape[1]} numbers.",
                Notice,
                stacklevel=2,
            )
        self.classes = shape[1]
        return logits, state.get(COLLECTION, {})

    def intercept(self, function: Any, arguments: Any, named: Any, context: Any) -> Any:
        """Record the input and the output of every layer, mark and batch norm."""
        module: Any = context.module
        refusals.refuse_bridge(self.module, module)
        if context.method_name != "__call__" or not isinstance(module, WATCHED):
            return function(*arguments, **named)
        for kind, why in refusals.KINDS.items():
            if isinstance(context.module, kind):
                raise InputError(f"{name_of(self.module)} has {place(module)}, a {kind.__name__}: {why}.")
        call = Call(module.path, self._counts[module.path])
        self._counts[module.path] += 1
        x, _ = argument(arguments, named)
        if isinstance(module, LINEAR):
            self.layers.setdefault(module.path, Layer(module.path, summed_axes(module, arguments, named)))
            self.calls.append(call)
        elif isinstance(module, nn.BatchNorm):
            self._check_norm(module, arguments, named)
            self.norms.append(call)
        else:
            self.marks.append(call)
        module.sow(COLLECTION, "input", x)
        y = function(*arguments, **named)
        module.sow(COLLECTION, "output", y)
        if isinstance(module, nn.BatchNorm):
            self.shapes[call] = y.shape
        return y

    def _check_norm(self, module: nn.BatchNorm, arguments: Any, named: Any) -> None:
        if type(module).__call__ is not nn.BatchNorm.__call__:
            raise InputError(f"{place(module)} is a {name_of(module)} with a call of its own: use nn.BatchNorm itself.")
        given = arguments[1] if len(arguments) > 1 else named.get("use_running_average")
        if not (module.use_running_average if given is None else given):
            raise InputError(
                f"{name_of(self.module)} normalises in {place(module)} with the moments of the batch, as in training: "
                f"{advice(self.module, self.call)}."
            )
        axes = module.axis if isinstance(module.axis, tuple | list) else (module.axis,)
        if [axis % argument(arguments, named)[0].ndim for axis in axes] != [argument(arguments, named)[0].ndim - 1]:
            raise InputError(f"{place(module)} has its channels on the axis {module.axis}: they must be on the last axis.")


def _value(module: nn.Module, left: Mapping[str, Any], call: Call, name: str) -> int:
    try:
        for part in call.path:
            left = left[part]
        return left[name][call.number]
    except (KeyError, IndexError) as error:
        words = f"{name_of(module)} has {'/'.join(call.path)} in a loop or a map (nn.scan, nn.vmap): unroll it."
        raise InputError(words) from error
