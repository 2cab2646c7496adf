"""Stage 3, fine-tuning: the quantized student follows the teacher on clean and on promoted images."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from hast_jax import augment, losses, models, parallel
from hast_jax.promote import Distances, promote

Array = jax.Array
Variables = Mapping[str, Any]


class State(NamedTuple):
    """What fine-tuning changes: the student's `params`, the optimizer's state, the number of steps done (scalar)."""

    params: Any
    opt_state: Any
    step: Array


class Frozen(NamedTuple):
    """What it does not change: the teacher's variables, the activation ranges, the synthetic images [n, h, w, c]."""

    teacher: Variables
    ranges: Variables
    images: Array


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """The rate of each step. config: `config.finetune`; `lr_drops` counts epochs of fine-tuning."""
    if config.schedule == "cosine":
        return optax.cosine_decay_schedule(config.lr, config.epochs * config.steps_per_epoch)
    drops = {epoch * config.steps_per_epoch: 0.1 for epoch in config.lr_drops}
    return optax.piecewise_constant_schedule(config.lr, drops)


def optimizer(schedule: optax.ScalarOrSchedule, momentum: float, weight_decay: float) -> optax.GradientTransformation:
    """PyTorch's SGD with Nesterov momentum; weight decay on every parameter enters before the momentum."""
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(schedule, momentum=momentum, nesterov=True))


def distances(teacher: nn.Module, student: nn.Module, frozen: Frozen, config: ConfigDict) -> Distances:
    """(params, images) -> (L_KL, L_FA) between the teacher and the student with these `params`."""

    def between(params: Any, images: Array) -> tuple[Array, Array]:
        target, teacher_taps = models.apply(teacher, frozen.teacher, images)
        variables = {"params": params, "batch_stats": frozen.teacher["batch_stats"], "ranges": frozen.ranges}
        logits, taps = models.apply(student, variables, images)
        kl = losses.distillation(target, logits, config.temperature, config.alpha)
        fa = config.lam * losses.ALIGNMENTS[config.alignment](teacher_taps.branches, taps.branches)
        return kl, fa

    return between


def loss_and_gradient(between: Distances, params: Any, images: Array, config: ConfigDict) -> tuple[dict[str, Array], Any]:
    """L = a * [L_KL(x) + L_FA(x)] + b * [L_KL(x') + L_FA(x')] on images x and promoted images x', with its gradient."""
    (kl, fa), clean_gradient, hard_images = promote(between, params, images, config.eps, config.direction)
    metrics = {"kl": kl, "fa": fa}
    loss, gradient = config.a * (kl + fa), jax.tree.map(lambda g: config.a * g, clean_gradient)
    if config.b > 0:

        def hard_loss(p: Any) -> tuple[Array, tuple[Array, Array]]:
            parts = between(p, hard_images)
            return config.b * (parts[0] + parts[1]), parts

        (hard, (kl_hard, fa_hard)), hard_gradient = jax.value_and_grad(hard_loss, has_aux=True)(params)
        metrics |= {"kl_promoted": kl_hard, "fa_promoted": fa_hard}
        loss, gradient = loss + hard, jax.tree.map(jnp.add, gradient, hard_gradient)
    return metrics | {"loss": loss}, gradient


def draw(images: Array, step: Array, key: Array, count: int, config: ConfigDict) -> Array:
    """This device's share of the batch of this step, augmented; the global batch is the same on any number of devices."""
    key = jax.random.fold_in(key, step)
    chosen = jax.random.choice(key, len(images), (config.batch,), replace=False)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(config.batch))
    batch, keys = images[parallel.own_share(chosen, count)], parallel.own_share(keys, count)
    if not config.augment:
        return batch
    return augment.random_resized_crop_and_flip(keys, batch, (config.crop_scale, 1.0))


def make_step(
    teacher: nn.Module, student: nn.Module, key: Array, count: int, config: ConfigDict
) -> Callable[[State, Frozen], tuple[State, dict[str, Array]]]:
    """One step of fine-tuning for `parallel.pmap_steps` over `count` devices. config: `config.finetune`."""
    schedule = learning_rate(config)
    transform = optimizer(schedule, config.momentum, config.weight_decay)

    def step(state: State, frozen: Frozen) -> tuple[State, dict[str, Array]]:
        images = draw(frozen.images, state.step, key, count, config)
        between = distances(teacher, student, frozen, config)
        metrics, gradient = loss_and_gradient(between, state.params, images, config)
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
