"""What XLA is told when it compiles a network for CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

# XLA (jaxlib 0.10 and 0.11) hands convolutions to its library YNNPACK, several layers at a time. On
# the body of VGG-16 (two cores with AVX-512) the network then takes 1.03 times as long at batch 1
# and 1.15 times at batch 8, chains of a quarter of its MACs 1.15 times, and its gradient twice as
# long. An empty list leaves convolutions to Eigen.
_WITHOUT_YNNPACK: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": ""}


@functools.cache
def network_options() -> dict[str, str | bool] | None:
    """Options for ``jax.jit`` or ``.compile`` under which networks run fastest; None for none.

    On CPU, those of versions of XLA that know them; elsewhere nothing has been measured.
    """
    if jax.default_backend() != "cpu":
        return None
    lowered = jax.jit(lambda number: number + 1).lower(0)
    try:
        lowered.compile(compiler_options=_WITHOUT_YNNPACK)
    except jax.errors.JaxRuntimeError:  # An option that this version does not know.
        return None
    return _WITHOUT_YNNPACK


def jit_network(function: Callable[..., Any], **settings: Any) -> Any:
    """``jax.jit`` with ``network_options``, for functions that run a network or a part of one."""
    return jax.jit(function, compiler_options=network_options(), **settings)
