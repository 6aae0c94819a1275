"""The rewrite: a copy of a network with chains of convolutions in place of single ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from accel.decompositions import DECOMPOSITIONS, Factor, Weights
from accel.plan import AccelerationPlan
from accel.program import named_layers, path_name


class FactorizedConv(nnx.Module):
    """A chain of convolutions that stands in for one; trainable like any other module.

    Args:
        conv: The convolution that is replaced; types and precision are taken over from it.
        factors: Shapes of the chain's convolutions, first to last.
        weights: Their weights; zeros where not given.
    """

    def __init__(
        self,
        conv: nnx.Conv,
        factors: Sequence[Factor],
        weights: Sequence[Weights] | None = None,
    ):
        self.factors = nnx.List([_conv_like(conv, factor) for factor in factors])
        if weights is None:
            return
        for factor, (kernel, bias) in zip(self.factors, weights, strict=True):
            if kernel.shape != factor.kernel.shape:
                raise ValueError(f"factor of shape {factor.kernel.shape} given {kernel.shape}")
            factor.kernel[...] = jax.device_put(np.asarray(kernel, conv.param_dtype))
            if factor.bias is not None and bias is not None:
                factor.bias[...] = jax.device_put(np.asarray(bias, conv.param_dtype))

    def __call__(self, inputs: jax.Array) -> jax.Array:
        for factor in self.factors:
            inputs = factor(inputs)
        return inputs


def _conv_like(conv: nnx.Conv, factor: Factor) -> nnx.Conv:
    return nnx.Conv(
        factor.in_channels,
        factor.out_channels,
        factor.kernel_size,
        factor.strides,
        padding=factor.padding,
        kernel_dilation=factor.kernel_dilation,
        use_bias=factor.use_bias,
        dtype=conv.dtype,
        param_dtype=conv.param_dtype,
        precision=conv.precision,
        preferred_element_type=conv.preferred_element_type,
        promote_dtype=conv.promote_dtype,
        conv_general_dilated=conv.conv_general_dilated,
        kernel_init=_zeros,
        bias_init=_zeros,
        rngs=nnx.Rngs(0),
    )


def _zeros(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
    """Zeros made by the host; JAX would compile them, and keep the code, for every rank."""
    del key
    return jax.device_put(np.zeros(shape, dtype))


def rewrite(
    model: nnx.Module,
    plan: AccelerationPlan,
    weights: Mapping[str, Sequence[Weights]] | None = None,
) -> nnx.Module:
    """A copy of ``model`` with every convolution that ``plan`` decomposes replaced by its chain.

    Args:
        model: The network, its batch normalisation folded as the plan says (``fold_batch_norm``);
            it is not changed, and shares no state with the copy.
        plan: What becomes of each convolution.
        weights: Weights of each chain by path; zeros without (to be loaded from a checkpoint).

    Raises:
        ValueError: If a path of the plan is no convolution of the network, or its kernel does not
            fit the ranks.
    """
    chosen = {layer.path: layer for layer in plan.layers if layer.decomposition is not None}
    convs = dict(named_layers(model, (nnx.Conv,)))
    if missing := sorted(chosen.keys() - convs.keys()):
        raise ValueError(
            f"the plan names {missing[0]!r}, which is no nnx.Conv of {type(model).__name__};"
            f" it has {', '.join(convs) or 'none'}"
        )

    def replace(parts, node):
        layer = chosen.get(path_name(parts))
        if layer is None or layer.decomposition is None:
            return node
        factors = DECOMPOSITIONS[layer.decomposition].factors(node, *layer.ranks)
        return FactorizedConv(node, factors, None if weights is None else weights[layer.path])

    return nnx.recursive_map(replace, nnx.clone(model))
