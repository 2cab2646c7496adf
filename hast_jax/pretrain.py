"""Train a full-precision teacher on real images, as was done for the built-in teacher of the digits.

python -m hast_jax.pretrain --config=configs/digits.py        # writes teacher.safetensors
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console
from rich.markup import escape

from hast_jax import cli, from_config, networks, paths
from hast_jax import config as config_lib
from hast_jax.cross_checks import base_splits
from hast_jax.data import datasets
from hast_jax.errors import UserError, sentence
from hast_jax.networks import Network, inference, structure, weights
from hast_jax.networks.from_nnx import FromNnx
from hast_jax.runs import parallel
from hast_jax.runs.files import write_bytes
from hast_jax.runs.progress import silent
from hast_jax.stages.evaluate import evaluator

Array = jax.Array

IN_MEMORY = ("digits", "cifar10", "cifar100")


def define_flags() -> None:
    """Define the flags of this command."""
    cli.define_config()
    flags.DEFINE_string("output", "teacher.safetensors", "The .safetensors file to write.")


class State(NamedTuple):
    """Training state; `step` is a scalar."""

    params: Any
    batch_stats: Any
    opt_state: Any
    step: Array


def shift(images: Array, key: Array, pixels: int) -> Array:
    """Images [batch, height, width, channels], each moved at random by up to `pixels` along both axes and filled with zeros."""
    if pixels == 0:
        return images
    padded = jnp.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * pixels + 1)

    def crop(image, corner):
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])

    return jax.vmap(crop)(padded, corners)


def train(network: Network, dataset: datasets.Arrays, config: ConfigDict, say: Callable[[str], None]) -> Mapping[str, Any]:
    """`params` and `batch_stats` after SGD with Nesterov momentum, a warm-up and a cosine schedule.

    config: the whole config. say: called with lines of progress. Raises UserError if the network cannot be trained, if the
    training diverges, or if the batch norms keep no statistics.
    """
    model = network.module
    settings, teacher = config.pretrain, config.teacher
    images, labels = jnp.asarray(dataset.images), jnp.asarray(dataset.labels)
    steps = settings.epochs * (len(labels) // settings.batch)
    warm_up = min(max(1, steps // 10), steps - 1)
    schedule = optax.warmup_cosine_decay_schedule(0.0, settings.lr, warm_up, steps)
    transform = optax.chain(optax.add_decayed_weights(settings.weight_decay), optax.sgd(schedule, 0.9, nesterov=True))
    key, training = jax.random.key(config.seed), {**network.call, **inference.training_arguments(model)}

    @jax.jit
    def step(state: State) -> tuple[State, Array]:
        draw_key, shift_key = jax.random.split(jax.random.fold_in(key, state.step))
        chosen = jax.random.choice(draw_key, len(labels), (settings.batch,), replace=False)
        batch = shift(datasets.normalise(images[chosen], teacher.mean, teacher.std), shift_key, settings.shift)

        def loss_fn(params: Any) -> tuple[Array, Any]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            dropout_key = jax.random.fold_in(shift_key, 1)
            keys = {"dropout": dropout_key, "params": jax.random.fold_in(dropout_key, 1)}  # "params": for keys of other names
            output, updated = model.apply(variables, batch, mutable=["batch_stats"], rngs=keys, **training)
            logits = structure.logits_of(output)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels[chosen]).mean()
            return loss, updated["batch_stats"]

        (loss, batch_stats), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = transform.update(gradient, state.opt_state, state.params)
        return State(optax.apply_updates(state.params, updates), batch_stats, opt_state, state.step + 1), loss

    first = jax.random.fold_in(key, 2**31 - 1)
    variables = model.init(first, jnp.zeros((1, *teacher.image)), **network.call)
    params = variables["params"]
    state = State(params, variables["batch_stats"], transform.init(params), jnp.zeros((), jnp.int32))
    _refuse_untrainable(network, step, state, tuple(teacher.image))

    def unchanged(batch_stats: Any) -> bool:
        return jax.tree.all(jax.tree.map(jnp.array_equal, batch_stats, variables["batch_stats"]))

    for epoch in range(settings.epochs):
        for number in range(steps // settings.epochs):
            state, loss = step(state)
            if epoch == number == 0 and unchanged(state.batch_stats):
                names = ", ".join(inference.TRAINING)
                raise UserError(
                    f"the batch norms of {structure.name_of(model)} keep no statistics in training: "
                    f"give its call an argument for training, with one of these names: {names}."
                )
        if not jnp.isfinite(loss) or (epoch + 1 == settings.epochs and not _finite(state)):
            raise UserError("the training diverged, and nothing is written: lower config.pretrain.lr.")
        if (epoch + 1) % 10 == 0 or epoch + 1 == settings.epochs:
            say(f"epoch {epoch + 1}: loss {float(loss):.4f}")
    return {"params": state.params, "batch_stats": state.batch_stats}


def _refuse_untrainable(network: Network, step: Callable[[State], Any], state: State, image: tuple[int, ...]) -> None:
    """Raise UserError if the network has variables that a weight file cannot hold, or if a step of its training fails."""
    weights.check_collections(network.module, {"params": state.params, "batch_stats": state.batch_stats}, image, network.call)
    try:
        jax.eval_shape(step, state)
    except Exception as error:  # whatever the network does wrong in training, which inference does not do
        words = sentence(error).rstrip(".")
        advice = "; give its nn.BatchNorm no axis_name" if isinstance(error, NameError) else ""
        raise UserError(f"{structure.name_of(network.module)} cannot be trained ({words}){advice}.") from error


def _finite(state: State) -> bool:
    return all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, state.batch_stats)))


def _try_to_write(output: Path, network: Network, image: tuple[int, ...]) -> None:
    """Write a file of the teacher's size, and delete it. Raises UserError, before the training, if this fails."""
    shapes = jax.eval_shape(lambda key: network.module.init(key, jnp.zeros((1, *image)), **network.call), jax.random.key(0))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(output, bytes(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))))
        output.unlink()
    except OSError as error:
        raise UserError(f"--output={output} cannot be written ({error.strerror}): choose another place.") from error


def main(_: list[str]) -> None:
    """Train, evaluate, write."""
    with cli.user_errors():
        config, console = flags.FLAGS.config, Console()
        config_lib.validate(config)
        output = paths.local(flags.FLAGS.output)
        if output.suffix != ".safetensors":
            raise UserError(f"--output={output}: the file must end in .safetensors.")
        if output.exists():
            raise UserError(f"--output={output} exists already: choose another name, or delete the file.")
        if config.eval.dataset not in IN_MEMORY:
            raise UserError(f"pretrain needs real images in memory: set config.eval.dataset to one of {', '.join(IN_MEMORY)}.")
        if {"train", "all"} & base_splits(config.eval.split):
            raise UserError("config.eval.split holds images of the train split, from which the teacher learns: choose another.")
        devices = parallel.setup(config.devices)
        network = from_config.bare_teacher(config)
        if isinstance(network.module, FromNnx):
            name = structure.name_of(network.module)
            raise UserError(f"pretrain trains networks of flax.linen: train {name} in your own code, and give its weights.")
        train_set: Any = datasets.load(config, "train")
        test_set: Any = datasets.load(config, config.eval.split)
        if config.pretrain.batch > len(train_set.labels):
            raise UserError(f"config.pretrain.batch is {config.pretrain.batch}, more than the {len(train_set.labels)} images.")
        _try_to_write(output, network, tuple(config.teacher.image))
        variables = train(network, train_set, config, console.print)
        evaluate = evaluator(partial(networks.logits, network), test_set, config, devices, silent)
        recipe = ", ".join(f"{name} {value}" for name, value in config.pretrain.items())
        state = weights.to_state_dict(network.module, variables, tuple(config.teacher.image), network.call)
        metadata = {
            "architecture": f"{config.teacher.network} ({next(iter(weights.libraries(network.module)))} names)",
            "dataset": config.eval.dataset,
            "num_classes": str(config.teacher.classes),
            "mean": str(list(config.teacher.mean)),
            "std": str(list(config.teacher.std)),
            "training": f"SGD nesterov, cosine, {recipe}, {len(train_set.labels)} images, seed {config.seed}",
        }
        write_bytes(output, weights.encoded(state, metadata))  # before anything can stop the evaluation
        top1 = evaluate(variables).top1
        write_bytes(output, weights.encoded(state, {**metadata, "test_top1": f"{top1:.2f}"}))
        console.print(f"{escape(str(output))}: top-1 {top1:.2f} % on {len(test_set.labels)} held-out images")


if __name__ == "__main__":
    cli.run(sys.modules["__main__"])
