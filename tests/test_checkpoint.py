import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx

import accel
from accel.batch_norm import find_foldable, fold_batch_norm
from accel.checkpoint import saved_spec
from accel.models import ModelSpec
from accel.plan import AccelerationPlan, LayerPlan
from accel.rewrite import rewrite

SPEC = ModelSpec(
    "vgg11",
    {"num_classes": 3, "hidden_features": [8], "pooled_size": 1, "batch_norm": True},
)
IMAGES = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))


def accelerated():
    model = SPEC.build(nnx.Rngs(1))
    model.eval()
    pairs = find_foldable(model, IMAGES)
    plan = AccelerationPlan((LayerPlan("conv3_1", "channel", (7,)), LayerPlan("conv1_1")), pairs)
    result = rewrite(fold_batch_norm(model, pairs), plan)
    for index, (_, variable) in enumerate(nnx.to_flat_state(nnx.state(result, nnx.Param))):
        noise = jax.random.normal(jax.random.key(index), variable.shape)
        variable[...] = variable[...] + 0.01 * noise
    return result, plan


def test_an_accelerated_network_is_rebuilt_from_its_folder_alone(tmp_path):
    model, plan = accelerated()
    accel.save_model(tmp_path / "model", model, SPEC, plan)
    again = accel.load_model(tmp_path / "model")
    np.testing.assert_array_equal(again(IMAGES), model(IMAGES))
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_description_is_read_back_as_it_was(tmp_path):
    spec = ModelSpec("vgg11", {"num_classes": 3, "hidden_features": (8, 4), "pooled_size": 1})
    accel.save_model(tmp_path / "model", spec.build(), spec)
    assert saved_spec(tmp_path / "model") == spec
    assert spec == ModelSpec(spec.name, {**spec.options, "hidden_features": [8, 4]})
    stages = {"stages": [[4, 4], (8,)], "num_classes": None}
    nested = ModelSpec("accel.models.vgg:VGG", stages)
    accel.save_model(tmp_path / "nested", nested.build(), nested)
    assert saved_spec(tmp_path / "nested") == nested
    assert nested.options["stages"] == ((4, 4), (8,))


def test_a_users_network_is_rebuilt_with_a_builder(tmp_path):
    result = accel.accelerate(
        networks.network("residual"),
        networks.images(20),
        2.0,
        decompositions="channel",
        reconstruction="weights",
        rank_selection="exact_energy",
    )
    accel.save_model(tmp_path / "model", result.model, plan=result.plan)
    again = accel.load_model(tmp_path / "model", lambda: networks.Residual(nnx.Rngs(9)))
    images = networks.images(3, seed=1)
    np.testing.assert_array_equal(again(images), result.model(images))
    with pytest.raises(ValueError, match="does not say how its original network is built"):
        accel.load_model(tmp_path / "model")


def residual(rngs, width=12):
    return networks.Residual(rngs, width)


def test_a_users_network_has_a_name_that_a_folder_alone_does_not_have_imported(tmp_path):
    spec = ModelSpec("test_checkpoint:residual", {"width": 8})
    model = spec.build(nnx.Rngs(3))
    accel.save_model(tmp_path / "model", model, spec)
    with pytest.raises(ValueError, match="code that is not run at a folder's word"):
        accel.load_model(tmp_path / "model")
    again = accel.load_model(tmp_path / "model", spec.build)
    model.eval()
    images = networks.images(3, seed=1)
    np.testing.assert_array_equal(again(images), model(images))
    assert saved_spec(tmp_path / "model") == spec


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("residual", "unknown model 'residual'; known: vgg11"),
        ("no_module:residual", "model 'no_module:residual': No module named 'no_module'"),
        ("test_checkpoint:no_function", "has no attribute 'no_function'"),
        (":residual", "model ':residual': Empty module name"),
    ],
)
def test_a_network_that_is_not_there_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        ModelSpec(name).build()


def test_an_unfinished_run_of_that_name_is_left_alone(tmp_path):
    model, plan = accelerated()
    solved = tmp_path / "model.partial" / "layers"
    solved.mkdir(parents=True)
    accel.save_model(tmp_path / "model", model, SPEC, plan)
    assert solved.is_dir()


def test_nothing_is_overwritten(tmp_path):
    model, plan = accelerated()
    (tmp_path / "model").mkdir()
    with pytest.raises(FileExistsError, match="exists already; nothing is overwritten"):
        accel.save_model(tmp_path / "model", model, SPEC, plan)


def test_a_network_that_does_not_fit_the_folder_is_refused(tmp_path):
    model, plan = accelerated()
    accel.save_model(tmp_path / "model", model, SPEC, plan)

    def other(**options):
        return lambda: ModelSpec("vgg11", {**SPEC.options, **options}).build()

    with pytest.raises(ValueError, match=r"'fc7/bias' has shape \(3,\), the network needs \(4,\)"):
        accel.load_model(tmp_path / "model", other(num_classes=4))
    with pytest.raises(ValueError, match="the network needs 'conv1_2/bias', which was not saved"):
        accel.load_model(tmp_path / "model", ModelSpec("vgg13", SPEC.options).build)
    (tmp_path / "model" / "model.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match=r"expected format 1 in model\.json, found 99"):
        accel.load_model(tmp_path / "model")
    with pytest.raises(ValueError, match="is no model folder"):
        accel.load_model(tmp_path / "nothing")


def test_types_are_not_changed_without_a_word(tmp_path):
    def build(dtype):
        return lambda: nnx.Linear(3, 2, param_dtype=dtype, rngs=nnx.Rngs(0))

    accel.save_model(tmp_path / "model", build(jnp.float32)())
    with pytest.raises(ValueError, match="'bias' is float32, the network needs bfloat16"):
        accel.load_model(tmp_path / "model", build(jnp.bfloat16))


def test_a_half_written_folder_of_a_killed_run_does_not_stand_in_the_way(tmp_path):
    model, plan = accelerated()
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "rest").write_text("of a killed run")
    accel.save_model(tmp_path / "model", model, SPEC, plan)
    assert jnp.isfinite(accel.load_model(tmp_path / "model")(IMAGES)).all()
    assert not (tmp_path / "model" / "rest").exists()
