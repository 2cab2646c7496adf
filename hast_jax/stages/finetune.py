"""Stage 3, fine-tuning: the quantized student follows the teacher on clean and on promoted images."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from hast_jax import networks
from hast_jax.method import augmentation, losses
from hast_jax.method.promotion import Distances, promote
from hast_jax.runs import parallel

Array = jax.Array
Images = Array | np.ndarray
Variables = Mapping[str, Any]


class State(NamedTuple):
    """What fine-tuning changes: the student's `params`, the optimizer's state, the number of steps done (scalar)."""

    params: Any
    opt_state: Any
    step: Array


class Strengths(NamedTuple):
    """The weights of the losses and the size of the promotion; scalars.

    They are arguments of the compiled step, so that runs that differ in them alone share one program.
    """

    a: Array
    b: Array
    lam: Array
    ce: Array
    eps: Array


class Frozen(NamedTuple):
    """What it does not change.

    teacher: its variables. ranges: of the activations. images [n, h, w, c], labels [n]: the synthetic set. seed: scalar.
    Where images are streamed they are instead those of the steps of one call, this device's share of each:
    images [steps, share, h, w, c], labels [steps, share].
    """

    teacher: Variables
    ranges: Variables
    images: Images
    labels: Images
    seed: Array
    strengths: Strengths


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """The rate of each step. config: `config.finetune`; `lr_drops` counts epochs of fine-tuning."""
    if config.schedule == "cosine":
        return optax.cosine_decay_schedule(config.lr, config.epochs * config.steps_per_epoch)
    drops = {epoch * config.steps_per_epoch: 0.1 for epoch in config.lr_drops}
    return optax.piecewise_constant_schedule(config.lr, drops)


def optimizer(schedule: optax.ScalarOrSchedule, momentum: float, weight_decay: float) -> optax.GradientTransformation:
    """PyTorch's SGD with Nesterov momentum; weight decay on every parameter enters before the momentum."""
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(schedule, momentum=momentum, nesterov=True))


def freeze(teacher: Variables, ranges: Variables, images: Images, labels: Images, config: ConfigDict) -> Frozen:
    """`Frozen`, with the seed and the strengths of the whole `config`."""
    strengths = Strengths(*(jnp.asarray(config.finetune[name]) for name in Strengths._fields))
    return Frozen(teacher, ranges, images, labels, jnp.uint32(config.seed), strengths)


def distances(teacher: nn.Module, student: nn.Module, frozen: Frozen, labels: Array, config: ConfigDict) -> Distances:
    """(params, images) -> {"kl": L_KL, "fa": L_FA} between the teacher and the student with these `params`.

    With `config.ce` above zero also "ce": the weighted cross-entropy of the student with `labels` [batch], for comparison with
    methods that train on labels.
    """

    def between(params: Any, images: Array) -> dict[str, Array]:
        target, teacher_taps = networks.apply(teacher, frozen.teacher, images)
        variables = {"params": params, "batch_stats": frozen.teacher["batch_stats"], "ranges": frozen.ranges}
        logits, taps = networks.apply(student, variables, images)
        kl = losses.distillation(target, logits, config.temperature, config.alpha)
        fa = frozen.strengths.lam * losses.ALIGNMENTS[config.alignment](teacher_taps.branches, taps.branches)
        if config.ce == 0:
            return {"kl": kl, "fa": fa}
        return {"kl": kl, "fa": fa, "ce": frozen.strengths.ce * losses.cross_entropy(logits, labels)}

    return between


def loss_and_gradient(
    between: Distances, params: Any, images: Array, strengths: Strengths, config: ConfigDict
) -> tuple[dict[str, Array], Any]:
    """L = a * [L_KL(x) + L_FA(x)] + b * [L_KL(x') + L_FA(x')] on images x and promoted images x', with its gradient.

    Where `between` gives a cross-entropy too, it is part of both brackets.
    """
    clean, clean_gradient, hard_images = promote(between, params, images, strengths.eps, config.direction)
    loss, gradient = strengths.a * sum(clean.values()), jax.tree.map(lambda g: strengths.a * g, clean_gradient)
    metrics = clean
    if config.b > 0:

        def hard_loss(p: Any) -> tuple[Array, dict[str, Array]]:
            parts = between(p, hard_images)
            return strengths.b * sum(parts.values(), jnp.zeros(())), parts

        (hard_value, hard), hard_gradient = jax.value_and_grad(hard_loss, has_aux=True)(params)
        metrics |= {f"{name}_promoted": value for name, value in hard.items()}
        loss, gradient = loss + hard_value, jax.tree.map(jnp.add, gradient, hard_gradient)
    return metrics | {"loss": loss}, gradient


def step_key(seed: Array, step: Array) -> Array:
    """The key of everything random in this step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 3), step)


def chosen_rows(key: Array, images: int, batch: int) -> Array:
    """Rows [batch] of the synthetic set of `images` images that are the global batch of the step with this key."""
    return jax.random.choice(key, images, (batch,), replace=False)


def draw(frozen: Frozen, step: Array, config: ConfigDict) -> tuple[Array, Array]:
    """This device's share of the images and labels of this step, augmented.

    The global batch depends on the seed and the step, not on the number of devices, nor on whether images are streamed.
    """
    key = step_key(frozen.seed, step)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(config.batch))
    if config.stream:
        rows = step % len(frozen.images)
    else:
        rows = parallel.own_share(chosen_rows(key, len(frozen.images), config.batch))
    images, labels = frozen.images[rows], frozen.labels[rows]
    if config.augment:
        keys = parallel.own_share(keys)
        images = augmentation.random_resized_crop_and_flip(keys, images, (config.crop_scale, 1.0))
    return jnp.asarray(images), jnp.asarray(labels)


def inputs(frozen: Frozen, calls: range, count: int, config: ConfigDict) -> Iterator[tuple[Frozen]]:
    """What each call gets beside the state, on `count` devices of this process.

    frozen: with all images, as NumPy arrays that may be memory-mapped. calls: the first step of each call. All images are
    copied to every device, once; or, with `config.stream`, a thread that runs ahead of the device reads those of each call.
    """
    if config.stream:
        return _stream(frozen, calls, count, config)
    return itertools.repeat((parallel.replicate(frozen, count),))


def _stream(frozen: Frozen, calls: range, count: int, config: ConfigDict) -> Iterator[tuple[Frozen]]:
    import grain

    images, labels = frozen.images, frozen.labels
    rows_of = jax.jit(jax.vmap(lambda step: chosen_rows(step_key(frozen.seed, step), len(images), config.batch)))

    def read(first: int) -> tuple[Images, Images]:
        rows = np.asarray(rows_of(first + np.arange(calls.step)))  # [steps, batch]
        rows = parallel.own_rows(rows, count)
        return images[rows], labels[rows]

    rest = parallel.replicate(frozen._replace(images=np.zeros(0), labels=np.zeros(0)), count)
    reader = grain.MapDataset.range(calls.start, calls.stop, calls.step).map(read)
    for batch in reader.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)):
        chosen, of_labels = parallel.shard(batch, count)
        yield (rest._replace(images=chosen, labels=of_labels),)


def make_step(
    teacher: nn.Module, student: nn.Module, config: ConfigDict
) -> Callable[[State, Frozen], tuple[State, dict[str, Array]]]:
    """One step of fine-tuning for `parallel.pmap_steps`. config: `config.finetune`."""
    schedule = learning_rate(config)
    transform = optimizer(schedule, config.momentum, config.weight_decay)

    def step(state: State, frozen: Frozen) -> tuple[State, dict[str, Array]]:
        images, labels = draw(frozen, state.step, config)
        between = distances(teacher, student, frozen, labels, config)
        metrics, gradient = loss_and_gradient(between, state.params, images, frozen.strengths, config)
        metrics, gradient = parallel.mean((metrics, gradient))
        updates, opt_state = transform.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= {
            "lr": jnp.asarray(schedule(state.step)),
            "gradient_norm": optax.tree.norm(gradient),
            "params_norm": optax.tree.norm(params),
            "update_norm": optax.tree.norm(updates),
        }
        return State(params, opt_state, state.step + 1), metrics

    return step


def init(params: Any, config: ConfigDict) -> State:
    """The state before the first step: the student starts from the teacher's `params`. config: `config.finetune`."""
    transform = optimizer(learning_rate(config), config.momentum, config.weight_decay)
    return State(params, transform.init(params), jnp.zeros((), jnp.int32))
