"""Folding of batch normalisation into the convolution before it, exactly, in any network.

``γ (W x + b - μ) / √(σ² + ε) + β`` is a convolution with the kernel ``W γ/√(σ² + ε)`` and the bias
``(b - μ) γ/√(σ² + ε) + β``. What stands before what is read off the traced program, not the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from accel.interpreter import specification
from accel.program import named_layers, path_name, trace


class Identity(nnx.Module):
    """Returns its input: what is left of a batch normalisation after folding."""

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        return inputs


def find_foldable(model: nnx.Module, images: Any) -> dict[str, str]:
    """Paths of the batch normalisations that can be folded, each with its convolution's path.

    These are the ``nnx.BatchNorm`` that use their running statistics, normalise the last axis and
    are given the output of an ``nnx.Conv`` that goes nowhere else and return it in the type that it
    had, each of them called once.

    Args:
        model: The network, called as ``model(images)`` in evaluation mode; it is not changed.
        images: Images, or anything with their ``shape`` and ``dtype``.
    """
    kinds = (nnx.Conv, nnx.BatchNorm)
    program = trace(model, images, kinds)
    layers = dict(named_layers(model, kinds))
    convs = {call.output: call for call in program.calls if type(layers[call.path]) is nnx.Conv}
    pairs: dict[str, str] = {}
    for norm in program.calls:
        layer, conv = layers[norm.path], convs.get(norm.input)
        if not isinstance(layer, nnx.BatchNorm) or conv is None:
            continue
        uses = sum(v is conv.output for eqn in program.jaxpr.eqns for v in eqn.invars)
        uses += sum(v is conv.output for v in program.jaxpr.outvars)
        # A layer told at its call to use the batch's own statistics has to reduce over the batch.
        own_statistics = any(
            eqn.primitive.name.startswith("reduce")
            for eqn in program.jaxpr.eqns[norm.start : norm.stop]
        )
        # What is behind a normalisation in float32 would be given the convolution's own type.
        types = {specification(v).dtype for v in (conv.output, norm.output)}
        last_axis = layer.axis in (-1, len(specification(conv.output).shape) - 1)
        if uses == 1 and last_axis and len(types) == 1 and not own_statistics:
            pairs[norm.path] = conv.path
    return pairs


def fold_batch_norm(model: nnx.Module, pairs: Mapping[str, str]) -> nnx.Module:
    """A copy of ``model`` with batch normalisations folded into convolutions, exactly.

    Args:
        model: The network; it is not changed.
        pairs: Path of each batch normalisation to be folded, with the path of its convolution;
            from ``find_foldable``.

    Returns:
        A copy that shares no state with ``model``: each normalisation is an ``Identity``, each
        convolution has a bias.
    """
    copy = nnx.clone(model)
    layers: dict[str, Any] = dict(named_layers(copy, (nnx.Conv, nnx.BatchNorm)))
    if unknown := [path for pair in pairs.items() for path in pair if path not in layers]:
        raise ValueError(f"{unknown[0]!r} is no layer of {type(model).__name__} to be folded")
    convs = {conv: _folded(layers[conv], layers[norm]) for norm, conv in pairs.items()}

    def replace(parts, node):
        path = path_name(parts)
        return Identity() if path in pairs else convs.get(path, node)

    return nnx.recursive_map(replace, copy)


def _folded(conv: nnx.Conv, norm: nnx.BatchNorm) -> nnx.Conv:
    scale = jax.lax.rsqrt(norm.var[...] + norm.epsilon)
    if norm.scale is not None:
        scale = scale * norm.scale[...]
    shift = -norm.mean[...] if conv.bias is None else conv.bias[...] - norm.mean[...]
    bias = shift * scale
    if norm.bias is not None:
        bias = bias + norm.bias[...]
    folded = nnx.Conv(
        conv.in_features,
        conv.out_features,
        conv.kernel_size,
        conv.strides,
        padding=conv.padding,
        input_dilation=conv.input_dilation,
        kernel_dilation=conv.kernel_dilation,
        feature_group_count=conv.feature_group_count,
        mask=conv.mask,
        dtype=conv.dtype,
        param_dtype=conv.param_dtype,
        conv_general_dilated=conv.conv_general_dilated,
        promote_dtype=conv.promote_dtype,
        preferred_element_type=conv.preferred_element_type,
        precision=conv.precision,
        kernel_init=nnx.initializers.zeros_init(),
        rngs=nnx.Rngs(0),
    )
    assert folded.bias is not None
    folded.kernel[...] = (conv.kernel[...] * scale).astype(conv.param_dtype)
    folded.bias[...] = jnp.asarray(bias, conv.param_dtype)
    return folded
