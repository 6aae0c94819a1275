"""The benchmark of an accelerated network: every figure of ``benchmark.json``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class NetworkBenchmark:
    """One network, run on batches of one size.

    Attributes:
        median_ms: Median time of a batch in milliseconds.
        interquartile_range_ms: Upper less lower quartile of these times.
        compile_seconds: Time to trace the network and to compile it, once, in seconds.
        xla_flops: Floating-point operations of a batch by XLA's cost analysis of the compiled
            program (a multiply-accumulate is two), None where the backend does not tell.
        xla_temporary_bytes: Device memory that XLA sets aside for intermediate results, None where
            the backend does not tell.
    """

    median_ms: float
    interquartile_range_ms: float
    compile_seconds: float
    xla_flops: float | None
    xla_temporary_bytes: int | None


@dataclasses.dataclass(frozen=True)
class PeerBenchmark:
    """The original network in another runtime, timed in turns with both networks.

    Attributes:
        median_ms: Median time of a batch in milliseconds.
        interquartile_range_ms: Upper less lower quartile of these times.
    """

    median_ms: float
    interquartile_range_ms: float


@dataclasses.dataclass(frozen=True)
class LayerBenchmark:
    """One convolution and what stands in its place, timed by themselves on batches of one size.

    Attributes:
        path: Path in the module tree.
        decomposition: Name of the chain that replaces it, None where it was left as it was.
        ranks: Ranks of the chain.
        macs_original: Multiply-accumulates per image of the convolution.
        macs_accelerated: Multiply-accumulates per image of the chain.
        original_ms: Milliseconds that the convolution takes for a batch, with the activation that
            follows directly, if one does.
        accelerated_ms: Milliseconds that the chain takes, likewise; of a layer that was left as it
            was, those of the convolution.
        original_share: ``original_ms`` over the median time of the whole original network. The
            compiler works across layers, so the shares of all need not add up to 1 or less.
        accelerated_share: ``accelerated_ms`` over that of the whole accelerated network.
    """

    path: str
    decomposition: str | None
    ranks: tuple[int, ...]
    macs_original: int
    macs_accelerated: int
    original_ms: float
    accelerated_ms: float
    original_share: float
    accelerated_share: float


@dataclasses.dataclass(frozen=True)
class BatchBenchmark:
    """Both networks on batches of one size.

    Attributes:
        batch_size: Images per batch.
        runs: Timed runs of each network, one after a run of the other.
        original: The original network.
        accelerated: The accelerated network.
        macs_speedup: Multiply-accumulates of all convolutions, original over accelerated.
        xla_speedup: ``xla_flops``, original over accelerated; None where the backend does not tell.
        measured_speedup: Time of the original over that of the accelerated network beside it, the
            median over the rounds.
        measured_over_macs: ``measured_speedup`` over ``macs_speedup``.
        peers: The original network in other runtimes, by their names.
        layers: Every convolution, in order of execution.
    """

    batch_size: int
    runs: int
    original: NetworkBenchmark
    accelerated: NetworkBenchmark
    macs_speedup: float
    xla_speedup: float | None
    measured_speedup: float
    measured_over_macs: float
    peers: Mapping[str, PeerBenchmark]
    layers: tuple[LayerBenchmark, ...]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What an acceleration gains on a device; see ``to_json`` for the file.

    Attributes:
        model: Name of the network.
        device: Where it ran.
        versions: Versions of the packages that matter.
        command: The command that was given.
        dtype: What both networks computed in.
        image_shape: Shape of one image, ``(height, width, channels)``.
        macs: Multiply-accumulates of all convolutions per image: original, accelerated, speedup.
        batches: The figures for each size of batches.
        not_timed: Convolutions that could not be timed by themselves, by path, and why.
    """

    model: str
    device: str
    versions: Mapping[str, str]
    command: str
    dtype: str
    image_shape: tuple[int, ...]
    macs: Mapping[str, float]
    batches: tuple[BatchBenchmark, ...]
    not_timed: Mapping[str, str]

    def to_json(self) -> str:
        """The text of ``benchmark.json``."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"
