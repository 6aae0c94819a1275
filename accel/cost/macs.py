"""Multiply-accumulates (MACs) of convolutions and matrix products, per image.

A convolution of an image costs ``positions · Π kernel · (in_channels / groups) · out_channels``
MACs: every tap counts, also one that falls on padding, and nothing else does (no bias, no
activation). This is the count of Zhang et al., arXiv:1505.06798, table 1, and of the usual tools.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import jax
import jax.extend.core as jex
from flax import nnx

from accel.program import Path, path_name

Counted = Mapping[str, Callable[[jex.JaxprEqn], int]]


@dataclasses.dataclass(frozen=True)
class ConvShape:
    """What the cost of a convolution depends on.

    Attributes:
        kernel_size: Taps along each spatial axis.
        in_channels: Channels of the input, all groups together.
        out_channels: Channels of the output, all groups together.
        output_positions: Spatial positions of the output per image (of a transposed convolution:
            of the input, since each of its positions meets every tap once).
        groups: Groups of channels that are convolved apart from each other.

    Raises:
        ValueError: If a size is below 1, or the groups do not divide the channels.
    """

    kernel_size: tuple[int, ...]
    in_channels: int
    out_channels: int
    output_positions: int
    groups: int = 1

    def __post_init__(self):
        sizes = (self.in_channels, self.out_channels, self.output_positions, self.groups)
        if min(*self.kernel_size, *sizes) < 1:
            raise ValueError(f"every size of a convolution must be at least 1, found {self}")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(f"the groups of a convolution must divide its channels, found {self}")

    @property
    def macs(self) -> int:
        """Multiply-accumulates per image."""
        taps = math.prod(self.kernel_size) * (self.in_channels // self.groups)
        return self.output_positions * taps * self.out_channels


def count_macs(model: nnx.Module, images: Any) -> dict[Path, int]:
    """MACs per image of every convolution and matrix product of ``model``, by path.

    The network is traced abstractly, in evaluation mode, for one image; nothing is computed. A
    MAC belongs to the innermost module whose ``__call__`` it happens in; the path of ``model``
    itself is ``""``. A ``scan`` counts as often as it runs, a ``cond`` as its dearest branch.

    Args:
        model: Any network, called as ``model(images)``; it is not changed, and may be abstract
            (as ``nnx.eval_shape`` makes it).
        images: Images ``[batch, …]``, or anything with their ``shape`` and ``dtype``. The size of
            the batch does not matter.

    Returns:
        Paths with at least one MAC, in order of execution.

    Raises:
        ValueError: If the network cannot be called with such an image, or has MACs inside a loop
            whose number of passes is not known beforehand (``while_loop``).
    """
    return _count(model, images, _CONVOLUTION | _PRODUCT)


def count_conv_macs(model: nnx.Module, images: Any) -> dict[Path, int]:
    """As ``count_macs``, but of the convolutions alone: what a speedup ("4×") is counted in."""
    return _count(model, images, _CONVOLUTION)


def count_dense_macs(model: nnx.Module, images: Any) -> dict[Path, int]:
    """As ``count_macs``, but of the dense layers (``nnx.Linear``) alone, no other product."""
    dense = {path_name(p) for p, node in nnx.iter_graph(model) if isinstance(node, nnx.Linear)}
    counted = _count(model, images, _PRODUCT)
    return {path: macs for path, macs in counted.items() if path in dense}


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def _convolution_macs(equation: jex.JaxprEqn) -> int:
    numbers = equation.params["dimension_numbers"]
    inputs, kernel = map(_shape, equation.invars)
    (output,) = map(_shape, equation.outvars)
    out_axis, in_axis, *tap_axes = numbers.rhs_spec
    batch_axis, _, *output_axes = numbers.out_spec
    # A transposed convolution is one over an input with zeros set between its values; the products
    # with those zeros are nobody's work, so its positions are the input's own.
    positions = [
        inputs[input_axis] if dilation > 1 else output[output_axis]
        for input_axis, output_axis, dilation in zip(
            numbers.lhs_spec[2:], output_axes, equation.params["lhs_dilation"], strict=True
        )
    ]
    groups = equation.params["feature_group_count"]
    return ConvShape(
        kernel_size=tuple(kernel[axis] for axis in tap_axes),
        in_channels=kernel[in_axis] * groups,
        out_channels=kernel[out_axis],
        output_positions=output[batch_axis] * math.prod(positions),
        groups=groups,
    ).macs


def _product_macs(equation: jex.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = _shape(equation.invars[0])
    (output,) = map(_shape, equation.outvars)
    return math.prod(output) * math.prod(left[axis] for axis in contracted)


_CONVOLUTION = {"conv_general_dilated": _convolution_macs}
_PRODUCT = {"dot_general": _product_macs}
_SCOPE = re.compile(r"accel\.macs\[(\d+)\]")


def _count(model: nnx.Module, images: Any, counted: Counted) -> dict[Path, int]:
    scoped = nnx.clone(model)
    scoped.eval()
    modules: list[tuple[Path, Any]] = [
        (path_name(parts), node)
        for parts, node in nnx.iter_graph(scoped)
        if isinstance(node, nnx.Module) and callable(node)
    ]
    for index, (_, module) in enumerate(modules):
        module.macs_scope = f"accel.macs[{index}]"
        object.__setattr__(module, "__class__", _scoped(type(module)))
    graphdef, state = nnx.split(scoped)
    image = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
    try:
        program = jax.make_jaxpr(lambda state, image: nnx.merge(graphdef, state)(image))(
            state, image
        )
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be called with one image, of shape {image.shape} and"
            f" type {image.dtype}: {error}"
        ) from error
    return dict(_walk(program.jaxpr, "", [path for path, _ in modules], counted))


@cache
def _scoped(kind: type) -> type:
    """A subclass of a module type whose calls stand under a name of their own in the trace."""

    def call(self, *args, **kwargs):
        with jax.named_scope(self.macs_scope):
            return kind.__call__(self, *args, **kwargs)

    return type(f"Scoped{kind.__name__}", (kind,), {"__call__": call})


def _walk(jaxpr: jex.Jaxpr, path: Path, paths: Sequence[Path], counted: Counted) -> Counter[Path]:
    """MACs of a program that stands inside the module at ``path``."""
    total: Counter[Path] = Counter()
    for equation in jaxpr.eqns:
        scopes = _SCOPE.findall(str(equation.source_info.name_stack))
        here = paths[int(scopes[-1])] if scopes else path
        name = equation.primitive.name
        if name in counted:
            total[here] += counted[name](equation)
            continue
        inner = [_walk(body, here, paths, counted) for body in _bodies(equation)]
        if name == "while" and any(inner):
            where = ", ".join(
                repr(path) for path in dict.fromkeys(p for body in inner for p in body)
            )
            raise ValueError(
                f"the MACs of {where} cannot be counted: they are inside a while_loop, whose number"
                " of passes is not known before it runs"
            )
        if name == "cond":
            inner = [max(inner, key=Counter.total)]
        passes = equation.params["length"] if name == "scan" else 1
        for body in inner:
            for at, macs in body.items():
                total[at] += passes * macs
    return total


def _bodies(equation: jex.JaxprEqn) -> Iterator[jex.Jaxpr]:
    """The programs inside an equation (the body of a loop, the branches of a cond, a call)."""
    kinds = (jex.Jaxpr, jex.ClosedJaxpr)
    values = list(equation.params.values())
    for value in jax.tree.leaves(values, is_leaf=lambda leaf: isinstance(leaf, kinds)):
        if isinstance(value, jex.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, jex.Jaxpr):
            yield value
