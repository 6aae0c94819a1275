"""Fresh parameters for a network: the paper's control, the same architecture trained from scratch.

Kernels are drawn as in He et al. (arXiv:1502.01852): normal, truncated at two standard deviations,
with variance ``2/n`` where n inputs go into an output. The 2 makes up for the ReLU before the
layer, which halves the second moment of what it lets through. Before the second and later factors
of a ``Chain`` there is no ReLU, so that their variance is ``1/n``: with ``2/n`` responses
would grow by a factor √2 with each, 64-fold over the twelve factorized layers of VGG-16.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from accel.program import path_name
from accel.rewrite import Chain

AFFINE = (nnx.Conv, nnx.ConvTranspose, nnx.Linear)
NORMS = (nnx.BatchNorm, nnx.LayerNorm, nnx.GroupNorm)


def reinitialized(model: nnx.Module, seed: int) -> nnx.Module:
    """A copy of ``model`` with fresh parameters, of which nothing was learned.

    Kernels of convolutions and linear layers, also those of factorized ones, are drawn (see the
    module's docstring), their biases are zero; normalisations get scale 1, bias 0 and, where they
    keep statistics, mean 0 and variance 1.

    Args:
        model: The network; it is not changed.
        seed: Seed of the kernels. Each is drawn by its place among them, in the order of paths.

    Raises:
        ValueError: If a parameter belongs to a layer of another kind.
    """
    fresh = nnx.clone(model)
    modules = {
        path_name(parts): node
        for parts, node in nnx.iter_graph(fresh)
        if isinstance(node, (*AFFINE, *NORMS, Chain))
    }
    unrectified = {
        f"{path}/factors/{index}"
        for path, module in modules.items()
        if isinstance(module, Chain)
        for index in range(1, len(module.factors))
    }
    left = {path_name(parts) for parts, _ in nnx.to_flat_state(nnx.state(fresh, nnx.Param))}
    for index, path in enumerate(sorted(modules)):
        module = modules[path]
        if isinstance(module, AFFINE):
            gain = 1.0 if path in unrectified else 2.0
            draw = nnx.initializers.variance_scaling(gain, "fan_in", "truncated_normal")
            key = jax.random.fold_in(jax.random.key(seed), index)
            module.kernel[...] = draw(key, module.kernel.shape, module.kernel.dtype)
        elif isinstance(module, NORMS) and module.scale is not None:
            module.scale[...] = jnp.ones_like(module.scale[...])
        if isinstance(module, (*AFFINE, *NORMS)) and module.bias is not None:
            module.bias[...] = jnp.zeros_like(module.bias[...])
        if isinstance(module, nnx.BatchNorm):
            module.mean[...] = jnp.zeros_like(module.mean[...])
            module.var[...] = jnp.ones_like(module.var[...])
        left -= {f"{path}/{name}" for name in ("kernel", "scale", "bias")}
    if left:
        raise ValueError(f"{min(left)}: no rule for a fresh parameter of such a layer")
    return fresh
