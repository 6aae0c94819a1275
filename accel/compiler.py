"""What XLA is told when it compiles a network for CPU, and compiling several programs at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax
from flax import nnx

from accel.report.environment import usable_cores

Options = dict[str, str | bool]
Wanted = TypeVar("Wanted")
Compiled = TypeVar("Compiled")
# Programs that are compiled at the same time, at most: with weights inside each takes several times
# their memory.
MOST_TOGETHER = 4

# XLA (jaxlib 0.10 and 0.11) hands convolutions, products of matrices and what stands between them
# to its library YNNPACK, several layers at a time. An empty list leaves them to Eigen, which is
# faster (scripts/measure_runtime_forms.py), for gradients by kernels above all. It is slower at
# convolutions that read few channels: depthwise ones, which can be most of a network, and the first
# one of a network, which is little of it.
_WITHOUT_YNNPACK: Options = {"xla_cpu_experimental_ynn_fusion_type": ""}


def network_options(network: nnx.Module) -> Options | None:
    """``compiler_options`` under which ``jax.jit`` runs a network fastest; None for the defaults.

    On CPU, for networks without depthwise convolutions, if this version of XLA knows the options;
    elsewhere nothing has been measured. A jitted function that has options cannot be called in
    another one.

    Args:
        network: What is run; what is made of it runs under the same options.
    """
    if jax.default_backend() != "cpu" or _has_depthwise(network):
        return None
    return _known()


def _has_depthwise(network: nnx.Module) -> bool:
    return any(
        isinstance(layer, nnx.Conv) and 1 < layer.feature_group_count == layer.in_features
        for _, layer in nnx.iter_graph(network)
    )


def compile_together(
    compiled: Callable[[Wanted], Compiled], wanted: Sequence[Wanted]
) -> Iterator[Compiled]:
    """What ``compiled`` makes of each of ``wanted``, in their order, for measuring times.

    On CPU some are compiled at the same time; other devices compile one after the other, since
    their compilers time what they choose among on the device itself. While the caller works with
    one nothing is being compiled.
    """
    if jax.default_backend() != "cpu":
        yield from map(compiled, wanted)
        return
    threads = min(usable_cores(), MOST_TOGETHER)
    # A setting of this thread, which the others are to follow.
    precision = matmul_precision()

    def as_here(one: Wanted) -> Compiled:
        with jax.default_matmul_precision(precision):
            return compiled(one)

    with ThreadPoolExecutor(threads) as pool:
        for begin in range(0, len(wanted), threads):
            yield from list(pool.map(as_here, wanted[begin : begin + threads]))


def matmul_precision() -> str | None:
    """What ``jax.default_matmul_precision`` says in this thread."""
    return getattr(jax.config, "jax_default_matmul_precision", None)


@functools.cache
def _known() -> Options | None:
    """The options, or None where the compiler does not know them."""
    lowered = jax.jit(lambda number: number + 1).lower(0)
    try:
        lowered.compile(compiler_options=_WITHOUT_YNNPACK)
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return None
    return _WITHOUT_YNNPACK
