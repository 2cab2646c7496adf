"""Stage 1, hard-sample synthesis: images optimised from noise against the teacher's own batch-norm statistics."""

import functools
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from ml_collections import ConfigDict

from hast_jax import networks
from hast_jax.method import augmentation, losses
from hast_jax.method import pyramid as pyramids
from hast_jax.method.pyramid import Unit
from hast_jax.method.schedules import Plateau, image_rate, plateau_update
from hast_jax.networks import Network
from hast_jax.runs import parallel, preemption, processes
from hast_jax.runs.files import crc32
from hast_jax.runs.loop import call_length, crosses, drive
from hast_jax.stages.job import Job

Array = jax.Array
Variables = Mapping[str, Any]


Pyramid = tuple[Array, ...]  # resolutions whose sum is the images: method/pyramid.py


class Best(NamedTuple):
    """The lowest loss so far (scalar) and its images."""

    loss: Array
    pyramid: Pyramid


class State(NamedTuple):
    """One batch under optimisation: its images as a pyramid, and labels [batch].

    batch: its number. iteration: steps done. best: None without `synthesis.return_to_best`.
    """

    pyramid: Pyramid
    labels: Array
    adam: Any
    plateau: Plateau
    batch: Array
    iteration: Array
    best: Best | None

    @property
    def result(self) -> Pyramid:
        """The batch's latest images or, with `synthesis.return_to_best`, those of the lowest loss."""
        return self.pyramid if self.best is None else self.best.pyramid


def objective(
    images: Array, labels: Array, teacher: Network, variables: Variables, settings: ConfigDict
) -> tuple[Array, dict[str, Array]]:
    """L_syn = L_BNS + beta * L_HIL of one batch, and its terms. settings: `config.synthesis`.

    The batch passes through the network in parts of `micro_batch` images. This does not change the values, because the moments
    of the batch are computed from those of its parts. With `remat`, the intermediate arrays of a part are recomputed for the
    gradient instead of kept.
    """

    def look(part: Array) -> tuple[Array, tuple[losses.Moments, ...]]:
        logits, taps = networks.apply(teacher, variables, part)
        return logits, losses.bn_moments(taps.batch_norms)

    parts = images.reshape(-1, parallel.micro_batch(settings.micro_batch, len(images)), *images.shape[1:])
    if settings.remat:
        logits, moments = lax.map(jax.checkpoint(look), parts)  # forces one part after the other
    else:
        logits, moments = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(look(part) for part in parts))
    mean_loss, var_loss = losses.bn_statistics(jax.tree.map(lambda moment: jnp.mean(moment, 0), moments))
    logits = logits.reshape(len(images), -1)
    hard = losses.hard_sample(logits, labels, settings.gamma)
    loss = mean_loss + var_loss + settings.beta * hard
    accuracy = jnp.mean(jnp.argmax(logits, 1) == labels)
    return loss, {"loss": loss, "bn_mean": mean_loss, "bn_var": var_loss, "hard": hard, "accuracy": accuracy}


def init(batch_index: Array, key: Array, shape: tuple[int, ...], classes: int, settings: ConfigDict) -> State:
    """The first state of batch number `batch_index`: images of noise, of this shape, and uniformly random labels.

    It depends only on the key and the batch's number, not on the number of devices. settings: `config.synthesis`.
    """
    image_key, label_key = jax.random.split(jax.random.fold_in(key, batch_index))
    pyramid = pyramids.start(image_key, shape, settings.scales)
    labels = jax.random.randint(label_key, shape[:1], 0, classes)
    infinite, zero = jnp.asarray(jnp.inf, pyramid[0].dtype), jnp.zeros((), jnp.int32)
    plateau = Plateau(jnp.asarray(settings.lr, pyramid[0].dtype), infinite, zero)
    best = Best(infinite, pyramid) if settings.return_to_best else None
    return State(pyramid, labels, optax.scale_by_adam().init(pyramid), plateau, batch_index, zero, best)


def step(
    state: State, variables: Variables, teacher: Network, key: Array, settings: ConfigDict, unit: Unit | None = None
) -> tuple[State, dict[str, Array]]:
    """One Adam step on the images. settings: `config.synthesis`. unit: of the teacher's inputs; None: they are normalised.

    With `return_to_best`, Adam begins anew at the images of the lowest loss whenever the rate drops. Without this, a rate
    of 0.5 makes a small loss explode, and the authors' schedule then lowers the rate for good, far from the best images.
    """

    def loss_fn(pyramid: Pyramid) -> tuple[Array, dict[str, Array]]:
        images = pyramids.images(pyramid, unit)
        if settings.crop_probability > 0:
            step_key = jax.random.fold_in(jax.random.fold_in(key, state.batch), state.iteration)
            images = _see_through_crop(images, step_key, settings)
        return objective(images, state.labels, teacher, variables, settings)

    gradient, metrics = jax.grad(loss_fn, has_aux=True)(state.pyramid)
    update, adam = optax.scale_by_adam().update(gradient, state.adam)
    rate = image_rate(state.plateau, state.iteration, settings)
    pyramid = jax.tree.map(lambda x, change: x - rate * change, state.pyramid, update)
    plateau = plateau_update(state.plateau, metrics["loss"], settings)
    best = state.best
    if best is not None:

        def choose(condition, a, b):
            return jax.tree.map(partial(jnp.where, condition), a, b)

        best = choose(metrics["loss"] < best.loss, Best(metrics["loss"], state.pyramid), best)
        again = best.pyramid, optax.scale_by_adam().init(best.pyramid)
        pyramid, adam = choose(plateau.lr < state.plateau.lr, again, (pyramid, adam))
    metrics = {**metrics, "lr": rate}
    return State(pyramid, state.labels, adam, plateau, state.batch, state.iteration + 1, best), metrics


def _see_through_crop(images: Array, key: Array, settings: ConfigDict) -> Array:
    crop_key, choice_key = jax.random.split(key)
    if settings.crop == "image":
        crop_key = jax.vmap(partial(jax.random.fold_in, crop_key))(jnp.arange(len(images)))
    cropped = augmentation.random_resized_crop(crop_key, images, (settings.crop_scale, 1.0), flip=settings.flip)
    return jnp.where(jax.random.bernoulli(choice_key, settings.crop_probability), cropped, images)


def plan(pending: list[int], begun: Mapping[int, int], size: int) -> list[tuple[list[int], int]]:
    """Groups of at most `size` batches that are optimised together, each with the iteration from which it resumes.

    pending: the unfinished batches. begun: batch -> iteration that it has reached. The groups that are furthest come first.
    """
    reached = [begun.get(batch, 0) for batch in pending]
    groups = []
    for iteration in sorted(set(reached), reverse=True):
        same = [batch for batch, own in zip(pending, reached) if own == iteration]
        groups += [(same[i : i + size], iteration) for i in range(0, len(same), size)]
    return groups


def run(job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Make all batches that the run lacks; returns images float32 [n, height, width, channels] and labels int32 [n] of all.

    Each device of all processes optimises `stack` batches at a time. The devices do not communicate, because BN statistics are
    those of one batch. A batch's images depend only on the seed and its number, so a run may resume on other devices. If a
    group of batches cannot be divided evenly among the devices, its first batch is repeated, and the copies are dropped.
    """
    settings, shape = job.config.synthesis, tuple(job.config.teacher.image)
    open_set = partial(job.storage.synthetic_set, settings.images, settings.batch, shape)
    processes.on_main(open_set)
    with job.storage.open_checkpoints("synthesis", keep=2) as checkpoints:
        _fill(job, open_set(create=False), checkpoints)
    # This waits for process 0, which may still be writing. Checkpoints of half-made batches are of no more use.
    processes.on_main(lambda: job.storage.drop_checkpoints("synthesis"))
    return open_set(create=False).read()


def _fill(job: Job, store: Any, checkpoints: Any) -> None:
    """Make every batch that `store` still lacks."""
    config, settings, key = job.config, job.config.synthesis, job.key(1)
    shape = (settings.batch, *config.teacher.image)
    unit = pyramids.unit_of(config.teacher.mean, config.teacher.std)
    start = jax.vmap(lambda batch: init(batch, key, shape, job.teacher.classes, settings))
    start_for = functools.cache(partial(parallel.pmap, start))
    step_for = functools.cache(
        partial(parallel.pmap_steps, on_each(lambda state, given: step(state, given, job.teacher, key, settings, unit)))
    )
    pending = store.pending()
    begun = _begun(checkpoints, jax.eval_shape(start, jax.ShapeDtypeStruct((1,), jnp.int32)), store)
    reached = {batch: int(row.iteration) for batch, row in begun.items()}
    processes.require_same({"half-made images": crc32((np.asarray(pending), np.asarray(sorted(reached.items()))))})
    done = (store.batches - len(pending)) * settings.iterations + sum(reached.values())
    size = memory(job.teacher, job.variables, shape, settings)
    parallel.warn_of_memory(size)
    stack = parallel.stack(settings.stack, size)
    together = parallel.device_total(job.devices) * stack
    with job.recorder.stage("synthesis", store.batches * settings.iterations, done) as stage:
        for batches, first in plan(pending, reached, together):
            count, own = parallel.distribute(batches, job.devices)
            if first:
                rows = parallel.split(_stack([begun[batch] for batch in own]), count)
                state = parallel.shard(rows, count)
            else:
                state = start_for(count)(parallel.split(jnp.asarray(own), count))
            requested = parallel.steps_per_call(config.steps_per_call)
            steps_per_call = call_length(requested, settings.iterations, first)
            loop = drive(
                step_for(count, steps_per_call),
                state,
                itertools.repeat((parallel.replicate(job.variables, count),)),
                start=first,
                stop=settings.iterations,
                steps_per_call=steps_per_call,
                every=(config.log_every, settings.save_every),
                what="synthesis",
            )
            for iteration, state, metrics, preempted in loop:
                position = done + (iteration - first) * len(batches)
                stage.update(position, metrics)
                if iteration < settings.iterations and (preempted or crosses(iteration, settings.save_every, steps_per_call)):
                    begun |= zip(batches, _rows(processes.gather(state)))
                    checkpoints.save(position, _stack(list(begun.values())))
                    if preempted:
                        preemption.leave()
            pyramid, labels = processes.gather((state.result, state.labels))
            for row, batch in enumerate(batches):
                begun.pop(batch, None)
                if processes.is_main():
                    store.write(batch, np.asarray(pyramids.images([each[row] for each in pyramid], unit)), labels[row])
            done += (settings.iterations - first) * len(batches)


def memory(teacher: Network, variables: Variables, shape: tuple[int, ...], settings: ConfigDict) -> int:
    """Rough estimate of the bytes that a step on one batch of this shape needs: four times the inputs of the batch norms.

    Compiled steps took 1.5 to 3.2 times these inputs. settings: `config.synthesis`.
    """
    images = parallel.micro_batch(settings.micro_batch, shape[0]) if settings.remat else shape[0]
    _, taps = jax.eval_shape(
        partial(networks.apply, teacher), variables, jax.ShapeDtypeStruct((images, *shape[1:]), jnp.float32)
    )
    return 4 * sum(tap.inputs.size * tap.inputs.dtype.itemsize for tap in taps.batch_norms)


def on_each(step: Callable[[State, Variables], tuple[State, Any]]) -> Callable[[State, Variables], tuple[State, Any]]:
    """`step` on each batch of a device. The batches are the leading axis of the state."""

    def on_all(state: State, variables: Variables) -> tuple[State, Any]:
        if len(state.labels) > 1:
            return jax.vmap(step, (0, None))(state, variables)
        # Under `vmap`, even a single batch would lose a CPU's fast convolutions.
        return jax.tree.map(lambda leaf: leaf[None], step(jax.tree.map(lambda leaf: leaf[0], state), variables))

    return on_all


def _begun(checkpoints: Any, like: State, store: Any) -> dict[int, State]:
    """The batches that were saved half-made and are still unfinished: number -> state on the host."""
    saved = checkpoints.restore(like, rows=store.batches) if store.pending() else None
    rows = _rows(saved) if saved is not None else []
    return {int(row.batch): row for row in rows if int(row.batch) in store.pending()}


def _rows(state: State) -> list[State]:
    return [jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(len(state.batch))]


def _stack(rows: list[State]) -> State:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
