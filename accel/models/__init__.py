"""Networks by name: a model is built from a name and keyword options, so a file can describe it."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from flax import nnx

from accel.models.vgg import STAGES, VGG

SMALL_VGG_DEFAULTS: dict[str, Any] = {
    "in_channels": 1,
    "num_classes": 10,
    "pool_last": False,
    "pooled_size": 1,
    "hidden_features": (),
}


def _vgg(name: str, **options: Any) -> VGG:
    return VGG(STAGES[name], **{"num_classes": 1000, **options})


MODELS: dict[str, Callable[..., nnx.Module]] = {
    **{name: partial(_vgg, name) for name in ("vgg11", "vgg13", "vgg16", "vgg19")},
    **{
        f"{name}_body": partial(_vgg, name, num_classes=None)
        for name in ("vgg11", "vgg13", "vgg16", "vgg19")
    },
    "small_vgg": lambda **options: _vgg("small_vgg", **{**SMALL_VGG_DEFAULTS, **options}),
}


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """What a network is rebuilt from: its builder's name and keyword options.

    The name is one of ``MODELS``, or says where a builder of the user's own is to be imported from:
    ``package.module:function``, called as ``function(rngs=nnx.Rngs(…), **options)``.

    Lists among the options are kept as tuples, so that a description equals the one that is read
    back from JSON.
    """

    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        options = {name: _with_tuples(value) for name, value in self.options.items()}
        object.__setattr__(self, "options", options)

    def build(self, rngs: nnx.Rngs | None = None) -> nnx.Module:
        """Builds the network with fresh parameters (seed 0 without ``rngs``)."""
        return build(self.name, rngs=rngs, **self.options)


def _with_tuples(value: Any) -> Any:
    """The value with all lists in it, at any depth, as tuples."""
    if isinstance(value, list | tuple):
        return tuple(_with_tuples(item) for item in value)
    if isinstance(value, Mapping):
        return {name: _with_tuples(item) for name, item in value.items()}
    return value


def _own_builder(name: str) -> Callable[..., nnx.Module]:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"model {name!r}: {error}") from error


def build(name: str, *, rngs: nnx.Rngs | None = None, **options: Any) -> nnx.Module:
    """Builds the network called ``name`` with fresh parameters (seed 0 without ``rngs``).

    Raises:
        ValueError: If the name is unknown, or an option is not one of the network's.
    """
    if name not in MODELS and ":" not in name:
        raise ValueError(
            f"unknown model {name!r}; known: {', '.join(MODELS)}, and package.module:function"
        )
    builder = MODELS[name] if name in MODELS else _own_builder(name)
    try:
        return builder(**options, rngs=nnx.Rngs(0) if rngs is None else rngs)
    except TypeError as error:
        raise ValueError(f"model {name!r} with options {options}: {error}") from error
