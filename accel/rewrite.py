"""The rewrite: a copy of a network with chains of layers in place of single ones."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, final

import jax
import numpy as np
from flax import nnx

from accel.decompositions import DECOMPOSITIONS, Factor, Weights
from accel.plan import AccelerationPlan
from accel.program import named_layers, path_name


class Chain(nnx.Module, abc.ABC):
    """A chain of layers that stands in for one; trainable like any other module.

    Args:
        layer: The layer that is replaced; types and precision are taken over from it.
        factors: Shapes of the chain's layers, first to last.
        weights: Their weights; zeros where not given.
    """

    def __init__(
        self,
        layer: Any,
        factors: Sequence[Factor],
        weights: Sequence[Weights] | None = None,
    ):
        self.factors = nnx.List([self.factor_like(layer, factor) for factor in factors])
        if weights is None:
            return
        for factor, (kernel, bias) in zip(self.factors, weights, strict=True):
            if kernel.shape != factor.kernel.shape:
                raise ValueError(f"factor of shape {factor.kernel.shape} given {kernel.shape}")
            factor.kernel[...] = jax.device_put(np.asarray(kernel, layer.param_dtype))
            if factor.bias is not None and bias is not None:
                factor.bias[...] = jax.device_put(np.asarray(bias, layer.param_dtype))

    def __call__(self, inputs: jax.Array) -> jax.Array:
        for factor in self.factors:
            inputs = factor(inputs)
        return inputs

    @staticmethod
    @abc.abstractmethod
    def factor_like(layer: Any, factor: Factor) -> Any:
        """A layer of the kind of ``layer`` with the shape of ``factor``, its weights zeros."""


@final
class FactorizedConv(Chain):
    """A chain of convolutions that stands in for one (see ``Chain``)."""

    @staticmethod
    def factor_like(layer: nnx.Conv, factor: Factor) -> nnx.Conv:
        return nnx.Conv(
            factor.in_channels,
            factor.out_channels,
            factor.kernel_size,
            factor.strides,
            padding=factor.padding,
            kernel_dilation=factor.kernel_dilation,
            use_bias=factor.use_bias,
            dtype=layer.dtype,
            param_dtype=layer.param_dtype,
            precision=layer.precision,
            preferred_element_type=layer.preferred_element_type,
            promote_dtype=layer.promote_dtype,
            conv_general_dilated=layer.conv_general_dilated,
            kernel_init=_zeros,
            bias_init=_zeros,
            rngs=nnx.Rngs(0),
        )


@final
class FactorizedLinear(Chain):
    """A chain of dense layers that stands in for one (see ``Chain``)."""

    @staticmethod
    def factor_like(layer: nnx.Linear, factor: Factor) -> nnx.Linear:
        return nnx.Linear(
            factor.in_channels,
            factor.out_channels,
            use_bias=factor.use_bias,
            dtype=layer.dtype,
            param_dtype=layer.param_dtype,
            precision=layer.precision,
            preferred_element_type=layer.preferred_element_type,
            promote_dtype=layer.promote_dtype,
            kernel_init=_zeros,
            bias_init=_zeros,
            rngs=nnx.Rngs(0),
        )


def chain_for(
    layer: nnx.Module, factors: Sequence[Factor], weights: Sequence[Weights] | None = None
) -> Chain:
    """The chain that stands in for ``layer``; the arguments are those of ``Chain``."""
    kind = FactorizedLinear if isinstance(layer, nnx.Linear) else FactorizedConv
    return kind(layer, factors, weights)


def _zeros(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
    """Zeros made by the host; JAX would compile them, and keep the code, for every rank."""
    del key
    return jax.device_put(np.zeros(shape, dtype))


def rewrite(
    model: nnx.Module,
    plan: AccelerationPlan,
    weights: Mapping[str, Sequence[Weights]] | None = None,
) -> nnx.Module:
    """A copy of ``model`` with every layer that ``plan`` decomposes replaced by its chain.

    Args:
        model: The network, its batch normalisation folded as the plan says (``fold_batch_norm``);
            it is not changed, and shares no state with the copy.
        plan: What becomes of each layer.
        weights: Weights of each chain by path; zeros without (to be loaded from a checkpoint).

    Raises:
        ValueError: If a path of the plan is no convolution or dense layer of the network, or its
            kernel does not fit the ranks.
    """
    chosen = {layer.path: layer for layer in plan.layers if layer.decomposition is not None}
    layers = dict(named_layers(model, (nnx.Conv, nnx.Linear)))
    if missing := sorted(chosen.keys() - layers.keys()):
        raise ValueError(
            f"the plan names {missing[0]!r}, which is no nnx.Conv or nnx.Linear of"
            f" {type(model).__name__}; it has {', '.join(layers) or 'none'}"
        )

    def replace(parts, node):
        layer = chosen.get(path_name(parts))
        if layer is None or layer.decomposition is None:
            return node
        factors = DECOMPOSITIONS[layer.decomposition].factors(node, *layer.ranks)
        return chain_for(node, factors, None if weights is None else weights[layer.path])

    return nnx.recursive_map(replace, nnx.clone(model))
