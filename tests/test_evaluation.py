import itertools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from accel.data import ArrayImages
from accel.data.settings import FolderImages
from accel.evaluation import accuracy, compare_outputs
from accel.evaluation import answers as evaluation_answers
from accel.evaluation.answers import Answers
from accel.experiment import Experiment
from accel.images import ArraySource
from accel.models import ModelSpec
from accel.progress import Progress


class Given(nnx.Module):
    """A network whose outputs are its images, ``[batch, 1, 1, classes] -> [batch, classes]``."""

    def __call__(self, images):
        return images.reshape(images.shape[0], -1)


def logits_source(logits, labels, **options):
    logits = np.asarray(logits, np.float32)
    return ArrayImages(logits[:, None, None, :], "unchanged", np.asarray(labels), **options)


def accuracy_over_all_tie_breaks(logits, labels, k):
    """The mean accuracy over all orders of preference among the classes."""
    orders = list(itertools.permutations(range(logits.shape[1])))
    correct = 0
    for order in orders:
        for row, label in zip(logits, labels, strict=True):
            ranked = sorted(
                range(len(row)), key=lambda c, row=row, order=order: (-row[c], order[c])
            )
            correct += label in ranked[:k]
    return correct / len(orders) / len(labels)


@pytest.fixture(scope="module")
def residual():
    return networks.Residual(nnx.Rngs(0))


def outputs(model, images):
    """What a network answers in evaluation mode to all images at once, a row per image."""
    evaluated = nnx.clone(model)
    evaluated.eval()
    graphdef, state = nnx.split(evaluated)
    answers = jax.jit(lambda state, images: nnx.merge(graphdef, state)(images))(state, images)
    return np.asarray(answers, np.float64).reshape(len(images), -1)


def arrays(model):
    return nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat)))


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_accuracy_is_the_mean_over_all_ways_to_break_ties(batch_size):
    generator = np.random.default_rng(0)
    # Few values, so that most rows have ties.
    logits, labels = generator.integers(0, 3, (30, 5)), generator.integers(0, 5, 30)
    source = logits_source(logits, labels, class_count=5)
    found = accuracy(Given(), source, top=(1, 2, 3, 5), batch_size=batch_size)
    assert found == pytest.approx(
        {f"top{k}": accuracy_over_all_tie_breaks(logits, labels, k) for k in (1, 2, 3, 5)}
    )


def test_a_network_that_answers_the_same_to_everything_is_at_chance():
    source = logits_source(np.zeros((7, 10)), np.arange(7))
    assert accuracy(Given(), source) == pytest.approx({"top1": 0.1, "top5": 0.5})


@pytest.mark.parametrize(("kept_bytes", "runs"), [(2**20, 3), (5 * 5 * 4, 2 + 3 + 2), (0, 9)])
def test_answers_are_computed_once_as_far_as_they_are_kept(monkeypatch, residual, kept_bytes, runs):
    """12 images in batches of 5, with 5 outputs each: read for accuracy, then twice to compare."""
    images = ArrayImages(np.asarray(networks.images(12)), "unchanged", np.arange(12) % 5)
    other = networks.network("residual", seed=4)
    expected = (
        accuracy(residual, images, batch_size=5),
        compare_outputs(residual, other, images, batch_size=5),
        compare_outputs(residual, residual, images, batch_size=5),
    )
    ran = []

    def counted(options):
        def run(forward, state, batch):
            ran.append(state is answers.state)
            return uncounted(options)(forward, state, batch)

        return run

    uncounted = evaluation_answers._run
    monkeypatch.setattr(evaluation_answers, "_run", counted)
    answers = Answers(residual, kept_bytes=kept_bytes)
    found = (
        accuracy(answers, images, batch_size=5),
        compare_outputs(answers, other, images, batch_size=5),
        compare_outputs(answers, residual, images, batch_size=5),
    )
    assert found == expected
    assert sum(ran) == runs
    # Held against themselves, the last batch being shorter.
    assert compare_outputs(answers, answers, images, batch_size=5)["relative_squared_error"] == 0


@pytest.mark.parametrize(("classes", "metrics"), [(9, {"top1"}), (10, {"top1", "top5"})])
def test_the_number_of_the_networks_outputs_decides_whether_there_is_a_top_5(
    tmp_path, classes, metrics
):
    """A file of labels does not tell how many classes there are."""

    class Network(nnx.Module):
        def __call__(self, images):
            return images.reshape(len(images), -1)[:, :classes]

    generator = np.random.default_rng(2)
    for name in "abc":
        pixels = generator.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    (tmp_path / "labels.txt").write_text("a.png 0\nb.png 3\nc.png 1\n")
    evaluation = FolderImages(
        tmp_path, labels=tmp_path / "labels.txt", image_size=8, shorter_side=8
    )
    assert evaluation.open().class_count is None
    experiment = Experiment(ModelSpec("vgg16"), None, evaluation, evaluation, metrics=("accuracy",))
    assert experiment.reference(Network(), Progress()).accuracy.keys() == metrics


def test_accuracy_runs_a_copy_in_evaluation_mode(residual):
    images = np.asarray(networks.images(12))
    labels = np.arange(12) % 5
    expected = np.mean(outputs(residual, images).argmax(1) == labels)
    before = jax.tree.map(np.asarray, arrays(residual))

    found = accuracy(residual, ArrayImages(images, "unchanged", labels), top=(1,), batch_size=5)

    assert found["top1"] == pytest.approx(expected)
    assert not residual.dropout.deterministic
    jax.tree.map(np.testing.assert_array_equal, before, arrays(residual))


class Counting(Given):
    traces = 0

    def __call__(self, images):
        type(self).traces += 1
        return super().__call__(images)


def test_a_smaller_last_batch_takes_no_second_compilation():
    def traces(run):
        Counting.traces = 0
        run()
        return Counting.traces

    logits, labels = np.eye(10), np.arange(10)
    source, model = logits_source(logits, labels), Counting()
    few = traces(lambda: accuracy(model, source, batch_size=10))
    assert traces(lambda: accuracy(model, source, batch_size=3)) == few > 0
    # Other batch sizes: for those above the network is not even traced again.
    few = traces(lambda: compare_outputs(model, model, source, batch_size=5))
    assert traces(lambda: compare_outputs(model, model, source, batch_size=4)) == few > 0


def test_labels_and_classes_have_to_fit():
    logits = np.eye(4)
    with pytest.raises(ValueError, match="label 4 of image 2 is none of Given's 4 classes"):
        accuracy(Given(), logits_source(logits, [0, 1, 4, 3]), top=(1,), batch_size=2)
    with pytest.raises(ValueError, match="Given tells 4 classes apart, the images have 6"):
        accuracy(Given(), logits_source(logits, [0, 1, 2, 3], class_count=6), top=(1,))
    with pytest.raises(ValueError, match="top-5 of 4 classes is not defined"):
        accuracy(Given(), logits_source(logits, [0, 1, 2, 3]), top=(1, 5))
    with pytest.raises(ValueError, match="labels are needed"):
        accuracy(Given(), ArrayImages(np.zeros((2, 1, 1, 4)), "unchanged"), top=(1,))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_accuracy_refuses_outputs_that_are_not_finite(value):
    logits = np.eye(7)
    logits[5, 3] = value
    with pytest.raises(ValueError, match="Given: the outputs for image 5 hold NaN or Inf"):
        accuracy(Given(), logits_source(logits, np.arange(7)), top=(1,), batch_size=2)


class Pair(nnx.Module):
    def __call__(self, images):
        return images, images


class Body(nnx.Module):
    def __call__(self, images):
        return images


@pytest.mark.parametrize("model", [Pair(), Body()])
def test_accuracy_refuses_outputs_that_are_no_logits(model):
    with pytest.raises(
        ValueError, match=r"expected (one array of outputs|outputs \[batch, classes\])"
    ):
        accuracy(model, logits_source(np.eye(4), np.arange(4)), top=(1,))


def perturbed(model, scale):
    """A copy of a network with noise on its weights."""
    copy = nnx.clone(model)
    generator = np.random.default_rng(7)
    for _, value in nnx.to_flat_state(nnx.state(copy, nnx.Param)):
        value[...] = value[...] + scale * generator.standard_normal(value.shape, np.float32)
    return copy


@pytest.mark.parametrize("name", ["body", "classifier"])
def test_comparison_against_float64(name, residual):
    original = nnx.Conv(3, 6, (3, 3), rngs=nnx.Rngs(0)) if name == "body" else residual
    accelerated = perturbed(original, 0.03)
    images = np.asarray(networks.images(11))
    f, g = outputs(original, images), outputs(accelerated, images)
    expected = {
        "relative_squared_error": np.sum((f - g) ** 2) / np.sum(f**2),
        "cosine": np.mean([a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(f, g, strict=True)]),
    }
    if name == "classifier":
        expected["agreement"] = np.mean(f.argmax(1) == g.argmax(1))
    found = compare_outputs(original, accelerated, ArraySource(images), batch_size=4)
    assert found == pytest.approx(expected, rel=1e-4)
    assert 0 < found["relative_squared_error"] < 1


def test_a_network_is_as_near_to_itself_as_can_be(residual):
    found = compare_outputs(
        residual, residual, ArraySource(np.asarray(networks.images(5))), batch_size=2
    )
    assert found["relative_squared_error"] == 0
    assert found["cosine"] == pytest.approx(1, abs=1e-12)
    assert found["agreement"] == 1


class Scaled(nnx.Module):
    def __init__(self, scale):
        self.scale = nnx.Param(jnp.asarray(scale))

    def __call__(self, images):
        return images * self.scale[...]


def test_comparison_keeps_the_digits_of_small_differences():
    # In float32, sums over this many squares would lose the last image altogether.
    images = np.full((64, 32, 32, 1), 1e4, np.float32)
    images[-1] = 1.0
    source = ArraySource(images)
    found = compare_outputs(Scaled(1.0), Scaled(np.float32(1.5)), source, batch_size=16)
    assert found["relative_squared_error"] == pytest.approx(0.25, rel=1e-12)
    assert found["cosine"] == pytest.approx(1, abs=1e-12)


def test_cosine_of_zero_vectors():
    images = np.zeros((4, 1, 1, 2), np.float32)
    images[:2] = 1
    # Of the four images one is zero for both networks and one for the other network alone.
    keep = np.array([1.0, 1.0, 0.0, 0.0], np.float32)[:, None, None, None]
    lost = keep * np.array([1.0, 0.0, 1.0, 1.0], np.float32)[:, None, None, None]
    found = compare_outputs(Scaled(keep), Scaled(lost), ArraySource(images), batch_size=4)
    assert found["cosine"] == pytest.approx(3 / 4)
    assert found["relative_squared_error"] == pytest.approx(1 / 2)


def test_comparisons_without_a_meaning_are_refused():
    source = ArraySource(np.ones((3, 1, 1, 4), np.float32))
    with pytest.raises(ValueError, match="original network's outputs are all zero"):
        compare_outputs(Scaled(0.0), Scaled(1.0), source)
    with pytest.raises(ValueError, match=r"have the shape \(3, 4\), .* \(3, 1, 1, 4\)"):
        compare_outputs(Given(), Body(), source)
    with pytest.raises(ValueError, match="accelerated network: the outputs for image 0 hold NaN"):
        compare_outputs(Scaled(1.0), Scaled(np.nan), source)
    with pytest.raises(ValueError, match="original network: the outputs for image 0 hold NaN"):
        compare_outputs(Scaled(np.inf), Scaled(1.0), source)
    with pytest.raises(ValueError, match="one image or more"):
        compare_outputs(Given(), Given(), ArraySource(np.ones((0, 1, 1, 4), np.float32)))


class Short(ArraySource):
    def batches(self, batch_size):
        yield self.images[:3]


def test_a_source_that_does_not_hold_what_it_says_is_refused():
    source = Short(np.ones((5, 1, 1, 4), np.float32))
    with pytest.raises(ValueError, match="has length 5 but gave 3"):
        compare_outputs(Given(), Given(), source)


class Counted(Progress):
    """Keeps what began and how much of it was done."""

    def __init__(self):
        self.work = []

    def begin(self, description, total):
        self.work.append([description, total, 0])

    def advance(self, amount):
        self.work[-1][2] += amount


def test_progress_tells_how_many_images_are_done():
    source = logits_source(np.eye(5), np.arange(5))
    progress = Counted()
    accuracy(Given(), source, batch_size=2, progress=progress)
    compare_outputs(Given(), Given(), source, batch_size=2, progress=progress)
    assert progress.work == [["measuring accuracy", 5, 5], ["comparing outputs", 5, 5]]
