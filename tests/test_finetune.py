import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from monitoring import compilations

import accel
from accel.data import ArrayImages, FlipAndShift, fashion_test_images
from accel.decompositions import DECOMPOSITIONS
from accel.models.vgg import VGG
from accel.plan import AccelerationPlan, LayerPlan
from accel.progress import Progress
from accel.rewrite import FactorizedConv, rewrite
from accel.training_step import TrainingState, gradient_rule, training_step

IMAGES = dataclasses.replace(
    fashion_test_images(),
    pixels=fashion_test_images().pixels[:256],
    labels=fashion_test_images().labels[:256],
)


def dense(batch_norm=False, dropout_rate=0.0, seed=0):
    """A VGG of two narrow convolutions."""
    model = VGG(
        ((8,), (16,)),
        num_classes=10,
        in_channels=1,
        batch_norm=batch_norm,
        pooled_size=2,
        hidden_features=(16,),
        dropout_rate=dropout_rate,
        rngs=nnx.Rngs(0),
    )
    return accel.reinitialized(model, seed)


def factorized(**options):
    plan = AccelerationPlan((LayerPlan("conv2_1", "channel", (6,)),))
    return accel.reinitialized(rewrite(dense(**options), plan), 0)


def lively():
    """Statistics, dropout and a factorized layer at once: what a state may hold."""
    return factorized(batch_norm=True, dropout_rate=0.3)


class Linear(nnx.Module):
    """Compiled in no time, for what hangs on no network in particular."""

    def __init__(self):
        self.head = nnx.Linear(28 * 28, 10, rngs=nnx.Rngs(0))

    def __call__(self, images):
        return self.head(images.reshape(len(images), -1))


CONV = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
SETTINGS = {
    "epochs": 2,
    "learning_rate": 3e-3,
    "batch_size": 64,
    "optimizer": "adamw",
    "augmentation": FlipAndShift(shift=1),
}


def arrays(model):
    return {
        "/".join(map(str, path)): np.asarray(variable[...])
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState)))
    }


def assert_same(model, other):
    found, expected = arrays(model), arrays(other)
    assert found.keys() == expected.keys()
    for path, values in expected.items():
        np.testing.assert_array_equal(found[path], values, path)


class Killed(Exception):
    pass


class KilledAt(Progress):
    """Ends a run after some of its steps, as a signal would: nothing of it is left in memory."""

    def __init__(self, steps):
        self.steps = steps

    def advance(self, amount):
        self.steps -= amount
        if self.steps < 0:
            raise Killed


class Said(Progress):
    def __init__(self):
        self.text = []
        self.total = self.advanced = 0

    def say(self, text):
        self.text.append(text)

    def begin(self, description, total):
        self.total = total

    def advance(self, amount):
        self.advanced += amount

    def describe(self, description):
        self.text.append(description)


@pytest.fixture(scope="module")
def trained():
    """A run that was never stopped."""
    return accel.finetune(lively(), IMAGES, evaluation=IMAGES.spread(100), seed=1, **SETTINGS)


@pytest.mark.parametrize(
    ("build", "optimizer", "rate"), [(dense, "sgd", 5e-2), (factorized, "adamw", 5e-3)]
)
def test_training_lowers_the_loss_and_raises_accuracy(build, optimizer, rate):
    result = accel.finetune(
        build(),
        IMAGES,
        epochs=15,
        learning_rate=rate,
        batch_size=32,
        optimizer=optimizer,
    )
    first, *_, last = result.history
    assert len(result.history) == 15
    assert last.loss < 0.6 * first.loss
    assert last.accuracy > first.accuracy + 0.2


def test_every_factor_is_trained_and_the_model_passed_in_is_not_changed():
    model = lively()
    before = arrays(model)
    result = accel.finetune(model, IMAGES, **SETTINGS)
    for path, values in arrays(model).items():
        np.testing.assert_array_equal(values, before[path], path)
    for path, values in arrays(result.model).items():
        assert not np.array_equal(values, before[path]), path
    assert isinstance(result.model.conv2_1, FactorizedConv)
    # In evaluation mode: dropout would make these differ.
    images = next(IMAGES.batches(8))
    np.testing.assert_array_equal(result.model(images), result.model(images))


def test_a_network_of_which_a_part_came_from_a_file_is_compiled_for_once():
    model = Linear()
    # As arrays are that were read from a file; the optimizer's are not.
    kernel = jax.device_put(model.head.kernel[...], jax.devices()[0])
    model.head.kernel.set_value(kernel)
    assert kernel.committed
    assert not model.head.bias[...].committed

    class Counting(Progress):
        def __init__(self):
            self.after = []

        def advance(self, amount):
            self.after.append(len(seen))

    counting = Counting()
    with compilations() as seen:
        accel.finetune(model, IMAGES, epochs=1, batch_size=64, progress=counting)
    assert counting.after[0] > 0
    assert counting.after == 4 * counting.after[:1]
    assert not kernel.is_deleted()


def test_the_same_seed_gives_the_same_and_another_another(trained):
    again = accel.finetune(lively(), IMAGES, evaluation=IMAGES.spread(100), seed=1, **SETTINGS)
    assert_same(again.model, trained.model)
    assert again.history == trained.history
    other = accel.finetune(lively(), IMAGES, seed=2, **SETTINGS)
    assert other.history != trained.history


# Eight steps: killed in the middle of an epoch, and just before and after its end.
@pytest.mark.parametrize("steps", [2, 3, 4, 6])
def test_a_run_that_was_killed_goes_on_to_the_same_result(tmp_path, trained, steps):
    def run(progress):
        return accel.finetune(
            lively(),
            IMAGES,
            evaluation=IMAGES.spread(100),
            seed=1,
            resume=tmp_path,
            checkpoint_seconds=0.0,
            progress=progress,
            **SETTINGS,
        )

    with pytest.raises(Killed):
        run(KilledAt(steps))
    said = Said()
    result = run(said)
    assert f"fine-tuning goes on after step {steps} of 8" in said.text
    assert said.advanced == said.total == 8 - steps
    assert_same(result.model, trained.model)
    assert result.history == trained.history
    # A finished run is not trained again.
    again = run(KilledAt(0))
    assert_same(again.model, trained.model)
    assert again.history == trained.history


def test_without_a_time_for_it_checkpoints_are_written_after_epochs(tmp_path, trained):
    with pytest.raises(Killed):
        accel.finetune(lively(), IMAGES, seed=1, resume=tmp_path, progress=KilledAt(7), **SETTINGS)
    said = Said()
    result = accel.finetune(lively(), IMAGES, seed=1, resume=tmp_path, progress=said, **SETTINGS)
    assert said.total == 4
    assert_same(result.model, trained.model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1e-3}, "another run: learning_rate is 0.003 there, 0.001 here$"),
        ({"augmentation": None}, "augmentation is 'FlipAndShift.*shift=1.*' there, None here$"),
        ({"images": IMAGES.spread(200)}, "images.count is 256 there, 200 here; images.digest"),
        ({"model": dense()}, "type is 'Linear' there, 'VGG' here; .*head/bias is .*and .* more$"),
        ({"model": accel.reinitialized(Linear(), 1)}, "another run: network.weights is "),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(tmp_path, change, message):
    asked = {"model": Linear(), "images": IMAGES, "resume": tmp_path, **SETTINGS}
    with pytest.raises(Killed):
        accel.finetune(**asked, checkpoint_seconds=0.0, progress=KilledAt(1))
    with pytest.raises(ValueError, match=message):
        accel.finetune(**{**asked, **change})


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_is_for_kernels_alone(optimizer):
    model = FactorizedConv(CONV, DECOMPOSITIONS["channel"].factors(CONV, 2))
    parameters = nnx.state(model, nnx.Param)
    parameters = jax.tree.map(jnp.ones_like, parameters)
    rule = gradient_rule(optimizer, 0.1, 0.5, 1.0, 0.0, 10)
    still = jax.tree.map(jnp.zeros_like, parameters)
    updates, _ = rule.update(still, rule.init(parameters), parameters)
    for path, update in nnx.to_flat_state(updates):
        assert bool(update[...].any()) == (path[-1] == "kernel"), path


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_whole_gradient_is_clipped_to_its_norm(optimizer):
    parameters = nnx.state(CONV, nnx.Param)
    gradient = jax.tree.map(lambda p: 7.0 * jnp.ones_like(p), parameters)
    clipped = jax.tree.map(lambda g: 0.5 * g / optax.tree.norm(gradient), gradient)
    limited, free = (gradient_rule(optimizer, 0.1, 0.0, norm, 0.0, 10) for norm in (0.5, None))
    expected, _ = free.update(clipped, free.init(parameters), parameters)
    found, _ = limited.update(gradient, limited.init(parameters), parameters)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


def test_the_learning_rate_rises_and_falls():
    rule = gradient_rule("sgd", 0.3, 0.0, None, 0.2, 10)
    parameters = {"bias": jnp.zeros(())}
    state, rates, momentum = rule.init(parameters), [], 0.0
    for _ in range(10):
        updates, state = rule.update({"bias": jnp.ones(())}, state, parameters)
        momentum = 1 + 0.9 * momentum
        rates.append(-float(updates["bias"]) / (1 + 0.9 * momentum))
    falling = [0.3 * (1 + np.cos(np.pi * t / 8)) / 2 for t in range(8)]
    np.testing.assert_allclose(rates, [0.1, 0.2, *falling], rtol=1e-5)


def test_bfloat16_computes_in_it_and_keeps_everything_in_float32():
    model = lively()
    result = accel.finetune(model, IMAGES, precision="bfloat16", seed=1, **SETTINGS)
    assert {values.dtype for values in arrays(result.model).values()} == {np.dtype("float32")}
    assert result.model(next(IMAGES.batches(2))).dtype == jnp.float32
    assert result.history[-1].loss < result.history[0].loss
    rule = gradient_rule("sgd", 0.1, 0.0, None, 0.0, 10)
    parameters, _, rest = nnx.split(model, nnx.Param, nnx.RngState, ...)[1:]
    state = TrainingState(parameters, rest, rule.init(parameters))
    step = training_step(model, rule, None, "bfloat16")
    images, labels = next(IMAGES.labelled_batches(4))
    program = str(step.trace(state, jax.random.key(0), np.uint32(0), images, labels).jaxpr)
    convolutions = [line for line in program.splitlines() if "= conv_general_dilated[" in line]
    assert convolutions
    assert all("bf16" in line for line in convolutions)


def test_a_network_that_diverges_stops_with_the_step():
    with pytest.raises(FloatingPointError, match=r"^step \d+ of epoch \d: the loss is "):
        accel.finetune(Linear(), IMAGES, epochs=9, learning_rate=1e38, clip_norm=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs and batch_size are 1 or more, found 0 and 64"),
        ({"learning_rate": 0.0}, "learning_rate is a number above 0, found 0.0"),
        ({"warmup": 1.0}, "warmup is a share from 0 to below 1, found 1.0"),
        ({"optimizer": "lion"}, "unknown optimizer 'lion'; known: sgd, adamw"),
        ({"precision": "float8"}, "unknown precision 'float8'; known: float32, bfloat16"),
        ({"images": dataclasses.replace(IMAGES, labels=None)}, "images: labels are needed"),
        (
            {"evaluation": dataclasses.replace(IMAGES, labels=None)},
            "evaluation images: labels are needed",
        ),
        (
            {"images": dataclasses.replace(IMAGES, labels=IMAGES.labels + 1, class_count=None)},
            "label 10 of image .* is none of the network's 10 classes",
        ),
        ({"images": dataclasses.replace(IMAGES, class_count=11)}, "the images have 11"),
        ({"evaluation": dataclasses.replace(IMAGES, class_count=11)}, "the images have 11"),
        ({"model": VGG(((4,),), num_classes=None, in_channels=1, rngs=nnx.Rngs(0))}, "found the s"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        accel.finetune(**{"model": Linear(), "images": IMAGES, **SETTINGS, **change})


def test_parameters_of_low_precision_are_refused():
    model = dense()
    model.fc6.kernel.set_value(model.fc6.kernel[...].astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="fc6/kernel: fine-tuning needs parameters in float32"):
        accel.finetune(model, IMAGES, **SETTINGS)


def test_images_are_augmented_as_asked():
    images = jnp.arange(2 * 4 * 5 * 1, dtype=jnp.float32).reshape(2, 4, 5, 1)
    assert np.array_equal(FlipAndShift(flip=False)(jax.random.key(0), images), images)
    flips = [FlipAndShift()(jax.random.key(seed), images) for seed in range(20)]
    for index in range(2):
        kept = [np.array_equal(flipped[index], images[index]) for flipped in flips]
        turned = [np.array_equal(flipped[index], images[index, :, ::-1]) for flipped in flips]
        assert np.all(np.logical_xor(kept, turned))
        assert 2 <= np.sum(kept) <= 18
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    windows = [padded[0, y : y + 4, x : x + 5] for y in range(3) for x in range(3)]
    shifted = [FlipAndShift(False, 1)(jax.random.key(seed), images)[0] for seed in range(60)]
    assert {
        [np.array_equal(image, window) for window in windows].index(True) for image in shifted
    } == set(range(9))
    with pytest.raises(ValueError, match="shift is 0 or more pixels, found -1"):
        FlipAndShift(shift=-1)


def test_images_are_taken_by_number_from_any_source():
    numbers = np.array([5, 0, 5, 99])
    for source in (IMAGES, OneByOne()):
        pixels, labels = source.take(numbers)
        np.testing.assert_array_equal(pixels, IMAGES.pixels[numbers])
        np.testing.assert_array_equal(labels, IMAGES.labels[numbers])


class OneByOne(ArrayImages):
    """A source that can only read ranges."""

    def __init__(self):
        super().__init__(IMAGES.pixels, "fashion", IMAGES.labels)

    take = accel.data.PixelSource.take


def test_a_reinitialized_network_has_nothing_of_the_old_one():
    model = lively()
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState))):
        variable[...] = jnp.full(variable.shape, 3.0)
    fresh, other = (arrays(accel.reinitialized(model, seed)) for seed in (3, 4))
    for path, values in fresh.items():
        name = path.rpartition("/")[2]
        if name == "kernel":
            gain = 1 if path == "conv2_1/factors/1/kernel" else 2
            fan_in = np.prod(values.shape[:-1])
            assert 0.6 < values.var() * fan_in / gain < 1.6, path
            assert not np.array_equal(values, other[path])
        else:
            assert np.all(values == {"bias": 0, "mean": 0, "scale": 1, "var": 1}[name]), path
    assert_same(accel.reinitialized(model, 3), accel.reinitialized(model, 3))
    assert all(np.all(values == 3.0) for values in arrays(model).values())


def test_a_parameter_without_a_rule_is_named():
    model = dense()
    model.temperature = nnx.Param(jnp.ones(()))
    with pytest.raises(ValueError, match="temperature: no rule for a fresh parameter"):
        accel.reinitialized(model, 0)
