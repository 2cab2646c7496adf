"""A step of synthesis sees the batch through a random crop as often as the config says, and learns through it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from hast_jax import from_config
from hast_jax.method import schedules
from hast_jax.stages import synthesize


def test_every_other_step_sees_a_crop_and_leaves_the_pixels_outside_it_alone() -> None:
    """All images of a batch share the crop, so that a pixel outside it stands still in each."""
    config = tiny.config(synthesis__crop_probability=0.5)
    teacher, variables = from_config.teacher(config)
    key, shape = jax.random.key(0), (8, *config.teacher.image)
    state = synthesize.init(0, key, shape, config.teacher.classes, config.synthesis)

    def do(config):
        return jax.jit(partial(synthesize.step, variables=variables, teacher=teacher, key=key, settings=config.synthesis))

    step, whole = do(config), do(tiny.config(synthesis__crop_probability=0.0))
    without, expected = whole(state)
    assert (np.asarray(without.pyramid[0]) != state.pyramid[0]).all()
    cropped = 0
    for iteration in range(40):
        after, metrics = step(state._replace(iteration=np.int32(iteration)))
        if metrics["loss"] == expected["loss"]:
            np.testing.assert_array_equal(after.pyramid[0], without.pyramid[0])
            continue
        cropped += 1
        still = np.asarray(after.pyramid[0] == state.pyramid[0])
        assert (still.all(0) == still.any(0)).all() and 0.3 < 1 - still[0].mean() <= 1
    assert 10 <= cropped <= 30


def test_with_a_crop_of_its_own_each_image_is_left_alone_elsewhere() -> None:
    config = tiny.config(synthesis__crop_probability=1.0, synthesis__crop="image")
    teacher, variables = from_config.teacher(config)
    key, shape = jax.random.key(0), (8, *config.teacher.image)
    state = synthesize.init(0, key, shape, config.teacher.classes, config.synthesis)
    step = jax.jit(partial(synthesize.step, variables=variables, teacher=teacher, key=key, settings=config.synthesis))
    after, _ = step(state)
    still = [image.tobytes() for image in np.asarray(after.pyramid[0] == state.pyramid[0])]
    assert len(set(still)) > 4  # two images may have the same crop, or the whole image
    for one in np.asarray(after.pyramid[0] == state.pyramid[0])[..., 0]:
        rows, columns = np.flatnonzero(~one.all(1)), np.flatnonzero(~one.all(0))
        assert not one[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].any()


def test_with_a_cosine_the_rate_of_the_images_falls_to_zero_whatever_the_loss_does() -> None:
    settings = tiny.config(synthesis__schedule="cosine", synthesis__lr=0.2, synthesis__iterations=10).synthesis
    state = synthesize.init(0, jax.random.key(0), (2, 8, 8, 1), 10, settings)
    rates = [float(schedules.image_rate(state.plateau, jnp.int32(i), settings)) for i in range(11)]
    np.testing.assert_allclose(rates, 0.1 * (1 + np.cos(np.pi * np.arange(11) / 10)), atol=1e-7)


def test_a_batch_that_explodes_returns_to_its_best_images_with_a_lower_rate() -> None:
    """The rate is so large that the loss soon rises; the images that it ends with are those of the lowest loss of all."""
    config = tiny.config(synthesis__return_to_best=True, synthesis__lr=2.0, synthesis__patience=3)
    teacher, variables = from_config.teacher(config)
    key, shape = jax.random.key(0), (8, *config.teacher.image)
    state = synthesize.init(0, key, shape, config.teacher.classes, config.synthesis)
    step = jax.jit(partial(synthesize.step, variables=variables, teacher=teacher, key=key, settings=config.synthesis))
    losses, drops = [], 0
    for _ in range(60):
        after, metrics = step(state)
        losses.append(float(metrics["loss"]))
        assert float(after.best.loss) == min(losses)
        if after.plateau.lr < state.plateau.lr:
            drops += 1
            np.testing.assert_array_equal(after.pyramid[0], after.best.pyramid[0])
            assert not np.any(after.adam.mu) and int(after.adam.count) == 0
        state = after
    assert drops > 0
    _, metrics = step(state._replace(pyramid=state.result))
    assert float(metrics["loss"]) == min(losses)
