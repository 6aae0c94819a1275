import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx

from accel.program import trace


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_running_segment_by_segment_gives_the_networks_output(name):
    model = networks.network(name)
    images = networks.images(3)
    program = trace(model, images)
    given, values = [program.images], [images]
    for call in program.calls:
        live = program.live(call)
        segment, parameters = program.segment(given, live)
        values = jax.jit(segment)(parameters, values)
        given, values = [call.output, *live], [call.layer(values[0]), *values]
    segment, parameters = program.segment(given, program.jaxpr.outvars)
    (output,) = segment(parameters, values)
    evaluated = nnx.clone(model)
    evaluated.eval()
    np.testing.assert_allclose(output, evaluated(images), rtol=1e-5, atol=1e-5)


def test_calls_stand_in_order_of_execution_not_of_definition():
    class Backwards(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Conv(4, 3, (3, 3), rngs=rngs)
            self.b = nnx.List([nnx.Conv(3, 4, (3, 3), rngs=rngs)])

        def __call__(self, x):
            return self.a(self.b[0](x))

    program = trace(Backwards(nnx.Rngs(0)), networks.images(2))
    assert [call.path for call in program.calls] == ["b/0", "a"]


def test_layers_under_remat_jit_and_in_lists_are_found():
    calls = trace(networks.network("residual"), networks.images(2)).calls
    assert [call.path for call in calls] == [
        "stem",
        *(f"blocks/{block}/conv{conv}" for block in range(3) for conv in (1, 2)),
    ]


def test_there_is_an_activation_only_where_the_output_goes_through_it_alone():
    class Activations(nnx.Module):
        def __init__(self, rngs):
            for name in ("relu", "written_out", "leaky", "both", "last"):
                setattr(self, name, nnx.Conv(3, 3, (1, 1), rngs=rngs))

        def __call__(self, x):
            x = nnx.relu(self.relu(x))
            x = jnp.maximum(0.0, self.written_out(x))
            x = nnx.leaky_relu(self.leaky(x))
            y = self.both(x)
            return self.last(nnx.relu(y) + y)

    calls = trace(Activations(nnx.Rngs(0)), networks.images(2)).calls
    assert {call.path: call.activation for call in calls} == {
        "relu": "relu",
        "written_out": "relu",
        "leaky": "leaky_relu",
        "both": "identity",
        "last": "identity",
    }


def test_a_maximum_with_another_constant_is_no_relu():
    class Clipped(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 3, (1, 1), rngs=rngs)

        def __call__(self, x):
            return jnp.maximum(self.conv(x), 0.5)

    assert trace(Clipped(nnx.Rngs(0)), networks.images(2)).calls[0].activation == "identity"


def test_layers_without_a_place_of_their_own_are_left_out_with_the_reason():
    class Odd(nnx.Module):
        def __init__(self, rngs):
            self.twice = nnx.Conv(3, 3, (3, 3), rngs=rngs)
            self.never = nnx.Conv(3, 3, (3, 3), rngs=rngs)
            self.looped = nnx.Conv(3, 3, (3, 3), rngs=rngs)
            self.once = nnx.Conv(3, 3, (3, 3), rngs=rngs)

        def __call__(self, x):
            x = self.twice(self.twice(x))
            x, _ = jax.lax.scan(lambda x, _: (self.looped(x), None), x, length=2)
            return self.once(x)

    program = trace(Odd(nnx.Rngs(0)), networks.images(2))
    assert [call.path for call in program.calls] == ["once"]
    assert program.left_out == {
        "twice": "called 2 times with the same weights",
        "never": "not called",
        "looped": "called inside control flow (scan, while or cond)",
    }


def test_constants_the_author_closed_over_are_carried_along():
    scale = jnp.arange(1.0, 4.0)

    class Scaled(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 3, (3, 3), rngs=rngs)

        def __call__(self, x):
            return self.conv(x * scale)

    model, images = Scaled(nnx.Rngs(0)), networks.images(2)
    program = trace(model, images)
    segment, parameters = program.segment([program.images], program.jaxpr.outvars)
    np.testing.assert_allclose(segment(parameters, [images])[0], model(images), rtol=1e-6)


def test_the_model_is_not_changed_by_tracing():
    model = networks.network("residual")
    before = nnx.graphdef(model)
    trace(model, networks.images(2))
    assert nnx.graphdef(model) == before


def test_images_that_do_not_fit_the_network_are_refused():
    with pytest.raises(ValueError, match=r"cannot be called with images of shape \(2, 8, 8, 5"):
        trace(networks.network("chain"), jax.ShapeDtypeStruct((2, 8, 8, 5), jnp.float32))


def standardised(inputs, kernel, *arguments, **options):
    centred = kernel - kernel.mean((0, 1, 2))
    return jax.lax.conv_general_dilated(inputs, centred, *arguments, **options)


class Odd(nnx.Module):
    """Convolutions whose kernel is not theirs alone to use, beside one in another type."""

    def __init__(self, rngs):
        self.plain = nnx.Conv(3, 4, (3, 3), dtype=jnp.bfloat16, rngs=rngs)
        self.normed = nnx.WeightNorm(nnx.Conv(4, 4, (3, 3), rngs=rngs), rngs=rngs)
        self.own = nnx.Conv(4, 4, (3, 3), conv_general_dilated=standardised, rngs=rngs)
        self.tied = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.penalised = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.stacked = nnx.vmap(lambda key: nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(key)))(
            jax.random.split(jax.random.key(0), 2)
        )
        self.query = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.learned = nnx.Param(jnp.ones((1, 7, 7, 4)))

    def __call__(self, x):
        x = self.own(self.normed(self.plain(x)))
        x = self.penalised(self.tied(x) * self.tied.kernel[...].mean())
        x = self.dense(x) + self.penalised.bias[...] + self.query(self.learned[...]).mean()
        ensemble = nnx.vmap(lambda conv, x: conv(x), in_axes=(0, None))
        return ensemble(self.stacked, x).mean(0)


def test_layers_whose_weights_are_not_what_they_compute_with_are_left_out_with_the_reason():
    program = trace(Odd(nnx.Rngs(0)), networks.images(2), (nnx.Conv, nnx.Linear))
    assert [call.path for call in program.calls] == ["plain", "dense"]
    assert program.left_out == {
        "normed/layer_instance": "its kernel is computed from the one that it holds",
        "own": "its kernel is computed from the one that it holds",
        "tied": "its kernel is used elsewhere, too",
        "penalised": "its bias is used elsewhere, too",
        "stacked": "called under vmap with weights of its own for each",
        "query": "its input has 1 rows for a batch of 2 images",
    }
