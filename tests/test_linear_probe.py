"""The linear probe: its arithmetic, and its script from files to a network for `accel run`."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import vgg_files
from flax import nnx
from safetensors.numpy import save_file
from test_data_idx import idx

import accel
from accel.cli import main as accel_main
from accel.configuration import load_config
from accel.data.settings import IdxImages
from accel.experiment import Experiment

CONFIG = Path(__file__).parent.parent / "configs" / "vgg16_probe_fashion.py"
SMALL_CONFIG = """
from accel.data.settings import IdxImages
from accel.experiment import Experiment
from accel.models import ModelSpec

config = Experiment(
    model=ModelSpec(
        "small_vgg",
        {
            "in_channels": 3,
            "num_classes": 10,
            "hidden_features": (),
            "pool_last": True,
            "pooled_size": 2,
        },
    ),
    weights=None,
    calibration=IdxImages(start=-20, stop=-10, preprocessing="caffe", image_size=16),
    evaluation=IdxImages(split="test", preprocessing="caffe", image_size=16),
    metrics=("accuracy",),
    batch_size=8,
)
"""


@pytest.fixture
def probe(script):
    return script("train_linear_probe")


def random_layer(probe, features, classes, seed=0):
    random = np.random.default_rng(seed)
    return probe.Linear(
        random.standard_normal((features, classes)), random.standard_normal(classes)
    )


def test_standardisation_gives_mean_0_and_variance_1_and_drops_what_is_constant(probe):
    features = np.random.default_rng(0).normal(3.0, [1.0, 50.0, 1e-5, 0.0], (200, 4))
    rows = probe.standardisation(features)(features)
    np.testing.assert_allclose(rows.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(rows.std(axis=0), [1, 1, 0, 0], atol=1e-12)


def test_the_folded_layer_gives_the_same_without_standardisation(probe):
    random = np.random.default_rng(1)
    scales = 10.0 ** np.arange(-2, 3)
    features = np.hstack([random.normal(2 * scales, scales, (300, 5)), np.full((300, 1), 7.0)])
    standardised = probe.standardisation(features)
    layer = random_layer(probe, 6, 4)
    folded = probe.folded(layer, standardised)
    unseen = random.normal(0, 3, (50, 6))
    np.testing.assert_allclose(folded(unseen), layer(standardised(unseen)), rtol=1e-11, atol=1e-11)
    # Of a feature that was constant nothing is known: no weight.
    np.testing.assert_array_equal(folded.kernel[5], 0)


def test_logistic_regression_finds_the_minimum_of_its_objective(probe):
    random = np.random.default_rng(2)
    features, labels = random.standard_normal((80, 6)), random.integers(0, 3, 80).astype(np.int32)
    found = probe.logistic_regression(features, labels, 0.05, random_layer(probe, 6, 3))

    def objective(kernel, bias):
        losses = optax.softmax_cross_entropy_with_integer_labels(features @ kernel + bias, labels)
        return losses.mean() + 0.05 / 2 * (kernel**2).sum()

    with jax.enable_x64(True):
        kernel_gradient, bias_gradient = jax.grad(objective, argnums=(0, 1))(
            *map(jnp.asarray, found)
        )
    # The objective is convex: where its gradient vanishes is its minimum.
    assert np.abs(kernel_gradient).max() < 1e-4
    assert np.abs(bias_gradient).max() < 1e-4
    expected = objective(*found) - 0.05 / 2 * (found.kernel**2).sum()
    np.testing.assert_allclose(probe.cross_entropy(found, features, labels), expected, rtol=1e-6)
    correct = (features @ found.kernel + found.bias).argmax(axis=1) == labels
    assert probe.share_correct(found, features, labels) == correct.mean()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A config of a small VGG, a weight file for its body, and a data set of ten clear classes."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "config.py").write_text(SMALL_CONFIG)
    save_file(vgg_files.torchvision(vgg_files.random_weights()), folder / "vgg.safetensors")
    random = np.random.default_rng(0)
    patterns = random.integers(0, 200, (10, 7, 7))
    for split, count in {"train": 90, "t10k": 20}.items():
        labels = np.arange(count, dtype=np.uint8) % 10
        pixels = (patterns[labels] + random.integers(0, 50, (count, 7, 7))).astype(np.uint8)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(idx(pixels))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


def options(probe, files, out, **changed):
    given = {"config": files / "config.py", "weights": files / "vgg.safetensors", "data": files}
    return probe.Options(**{**given, "out": out, "images": 60, "held_back": 10, **changed})


def test_the_script_makes_a_network_that_accel_run_takes(probe, files, tmp_path, monkeypatch):
    out, partial = tmp_path / "probe", tmp_path / "probe.partial"
    monkeypatch.setattr(probe, "IMAGES_PER_FILE", 25)

    def stopped(*arguments, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(probe, "accuracy", stopped)
        with pytest.raises(KeyboardInterrupt):
            probe.main(options(probe, files, out))
    kept = sorted((partial / "features").iterdir())
    assert [file.name for file in kept] == [
        "held-back_000000.npz",
        "training_000000.npz",
        "training_000025.npz",
        "training_000050.npz",
    ]
    with pytest.raises(FileExistsError, match="another experiment"):
        probe.main(options(probe, files, out, images=50))
    # What was computed is not computed again.
    with monkeypatch.context() as patched:
        patched.setattr(probe.VGG, "pooled", stopped)
        patched.setattr(probe, "accuracy", lambda *arguments, **named: {"top1": 0.0})
        patched.setattr(probe, "save_model", stopped)
        with pytest.raises(KeyboardInterrupt):
            probe.main(options(probe, files, out))
    probe.main(options(probe, files, out))
    assert not partial.exists()
    assert sorted(file.name for file in out.iterdir()) == [
        "experiment.json",
        "model",
        "report.json",
    ]
    report = json.loads((out / "report.json").read_text())
    assert report["images"] == {"training": 60, "held-back": 10}
    assert report["weights"] == "vgg.safetensors"
    assert report["chosen"]["training_accuracy"] == 1.0
    assert report["chosen"]["held_back_accuracy"] >= 0.9
    assert report["chosen"] == min(report["tried"], key=lambda t: t["held_back_cross_entropy"])

    # The network against NumPy: the body's features with the weights of the file, then its layer.
    model = accel.load_model(out / "model")
    test = IdxImages(files, "test", preprocessing="caffe", image_size=16).open()
    ((images, labels),) = test.labelled_batches(20)
    body = vgg_files.body_output(vgg_files.random_weights(), images)
    features = vgg_files.max_pool(body).transpose(0, 2, 3, 1).reshape(20, -1)
    logits = features @ np.asarray(model.fc6.kernel) + np.asarray(model.fc6.bias)
    np.testing.assert_allclose(model(images), logits, rtol=1e-3, atol=1e-3)
    assert report["test_accuracy"] == (logits.argmax(axis=1) == labels).mean()
    assert report["test_accuracy"] >= 0.9

    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        probe.main(options(probe, files, out))

    run = ["run", str(files / "config.py"), "--smoke", "--weights", str(out / "model")]
    run += ["--calibration.folder", str(files), "--evaluation.folder", str(files)]
    run += ["--reconstruction", "responses"]  # Faster, and as good to see that it runs.
    assert accel_main([*run, "--out", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "report.json").read_text())["metrics"]
    assert metrics["top1"]["original"] == report["test_accuracy"]


@pytest.mark.parametrize(
    ("changed", "edit", "message"),
    [
        ({"images": 85}, (), "85 images to train on and 10 held back wanted, 90 training"),
        ({"held_back": 0}, (), "images and held_back are 1 or more"),
        ({}, ('"hidden_features": ()', '"hidden_features": (8,)'), "no hidden layers"),
        ({}, ('"num_classes": 10', '"num_classes": 9'), "9 outputs for 10 classes"),
        ({}, ("evaluation=Idx", "evaluation=FolderImages() or Idx"), "evaluation is no IdxImages"),
    ],
)
def test_what_does_not_fit_is_refused_before_long_work(
    probe, files, tmp_path, changed, edit, message
):
    config = tmp_path / "config.py"
    text = SMALL_CONFIG.replace(*edit) if edit else SMALL_CONFIG
    config.write_text(text.replace("import IdxImages", "import FolderImages, IdxImages"))
    with pytest.raises(ValueError, match=message):
        probe.main(options(probe, files, tmp_path / "out", config=config, **changed))
    assert list(tmp_path.iterdir()) == [config]


def test_the_config_of_the_real_network_fits_together(probe):
    config = load_config(CONFIG, Experiment)
    model = nnx.eval_shape(config.model.build)
    assert model.fc6.kernel.shape == (2 * 2 * 512, 10)
    images = jax.ShapeDtypeStruct((3, 64, 64, 3), jnp.float32)
    # 2×2 positions come out of the body, so that the average over bins leaves them as they are.
    assert jax.eval_shape(type(model).features, model, images).shape == (3, 4, 4, 512)
    assert jax.eval_shape(type(model).pooled, model, images).shape == (3, 2048)
    defaults = probe.Options(CONFIG, Path(), Path(), Path())
    training_images = range(60_000)
    seen = {*training_images[: defaults.images], *training_images[-defaults.held_back :]}
    calibration = training_images[config.calibration.start : config.calibration.stop]
    assert len(calibration) == 3_000
    assert not seen.intersection(calibration)
