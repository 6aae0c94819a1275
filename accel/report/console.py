"""The closing tables of a run and of a benchmark, for a reader at a console."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from accel.report.benchmark import BatchBenchmark, Benchmark
from accel.report.report import Report


def summary(report: Report) -> RenderableType:
    """What became of each layer, and what it gave: cost, measured time, metrics."""
    macs = report.macs
    title = f"{report.model}: {macs['speedup']:.2f}× fewer MACs"
    totals = [("all", "original", "accelerated")]
    if "dense_speedup" in macs:
        title += f", dense layers {macs['dense_speedup']:.2f}×"
        totals = [
            ("all convolutions", "original", "accelerated"),
            ("all dense layers", "dense_original", "dense_accelerated"),
        ]
    table = _table(title, ("layer", "chain", "ranks"), ("MMACs before", "after", "response error"))
    for layer in report.layers:
        table.add_row(
            layer.path,
            layer.decomposition or f"dense ({layer.reason})",
            ", ".join(map(str, layer.ranks)),
            f"{layer.macs_original / 1e6:,.1f}",
            f"{layer.macs_accelerated / 1e6:,.1f}",
            "" if layer.response_error is None else f"{layer.response_error:.4f}",
        )
    table.add_section()
    for name, before, after in totals:
        table.add_row(name, "", "", f"{macs[before] / 1e6:,.1f}", f"{macs[after] / 1e6:,.1f}", "")
    lines = [
        *(
            f"batch {batch}: {time['original_ms']:.2f} ms → {time['accelerated_ms']:.2f} ms,"
            f" {time['speedup']:.2f}× measured, round by round"
            for batch, time in report.latency.items()
        ),
        *(
            f"{name}: " + ", ".join(f"{which} {value:.4f}" for which, value in metric.items())
            for name, metric in report.metrics.items()
        ),
        *(
            f"{name}: held-out error of the outputs {gain['error_before']:.4f} →"
            f" {gain['error_after']:.4f}"
            for name, gain in report.repair.items()
        ),
        "time: " + ", ".join(f"{name} {value:.1f} s" for name, value in report.seconds.items()),
        f"host memory: {report.memory['measured_peak_bytes'] / 2**30:.2f} GiB at its peak,"
        f" {report.memory['stated_peak_bytes'] / 2**30:.2f} GiB stated; on {report.device}",
    ]
    return Group(table, Text("\n".join(lines)))


def benchmark_summary(benchmark: Benchmark) -> RenderableType:
    """What both networks take, what was gained by each count, and where the time goes."""
    networks = _table(
        f"{benchmark.model}, images {'×'.join(map(str, benchmark.image_shape))} {benchmark.dtype}",
        ("batch", "network"),
        ("median ms", "IQR ms", "runs", "compile s", "XLA GFLOPs", "XLA MiB"),
    )
    speedups = _table("speedup", ("batch",), ("MACs", "XLA FLOPs", "measured", "measured / MACs"))
    for batch in benchmark.batches:
        for name, times in (("original", batch.original), ("accelerated", batch.accelerated)):
            networks.add_row(
                str(batch.batch_size),
                name,
                _milliseconds(times.median_ms),
                _milliseconds(times.interquartile_range_ms),
                str(batch.runs),
                f"{times.compile_seconds:.2f}",
                _or_untold(times.xla_flops, 1e-9, ",.3f"),
                _or_untold(times.xla_temporary_bytes, 1 / 2**20, ",.2f"),
            )
        for name, peer in batch.peers.items():
            networks.add_row(
                str(batch.batch_size),
                f"original, {name}",
                _milliseconds(peer.median_ms),
                _milliseconds(peer.interquartile_range_ms),
                str(batch.runs),
            )
        speedups.add_row(
            str(batch.batch_size),
            f"{batch.macs_speedup:.2f}×",
            _or_untold(batch.xla_speedup, 1, ".2f", "×"),
            f"{batch.measured_speedup:.2f}×",
            f"{batch.measured_over_macs:.2f}",
        )
    lines = [
        "IQR is the interquartile range of the runs. XLA FLOPs are those of a batch, by the"
        " compiler's own cost analysis; XLA MiB is what it sets aside for intermediate results.",
        "Layers are timed by themselves; the compiler works across them: shares need not add up.",
        *(f"{path} was not timed: {reason}" for path, reason in benchmark.not_timed.items()),
        f"on {benchmark.device}",
    ]
    layers = (_layer_table(batch) for batch in benchmark.batches)
    return Group(networks, speedups, *layers, Text("\n".join(lines)))


def _layer_table(batch: BatchBenchmark) -> Table:
    table = _table(
        f"layers at batch {batch.batch_size}",
        ("layer", "chain and ranks"),
        ("MMACs before", "after", "ms before", "after", "share before", "after"),
    )
    for layer in batch.layers:
        table.add_row(
            layer.path,
            f"{layer.decomposition or 'dense'} {', '.join(map(str, layer.ranks))}".rstrip(),
            f"{layer.macs_original / 1e6:,.1f}",
            f"{layer.macs_accelerated / 1e6:,.1f}",
            _milliseconds(layer.original_ms),
            _milliseconds(layer.accelerated_ms),
            f"{layer.original_share:.1%}",
            f"{layer.accelerated_share:.1%}",
        )
    return table


def _table(title: str, texts: Sequence[str], figures: Sequence[str]) -> Table:
    """An empty table with columns of text, then columns of figures."""
    table = Table(title=title, expand=False)
    for column in texts:
        table.add_column(column, overflow="fold")
    for column in figures:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _milliseconds(time: float) -> str:
    """With four digits or a few more, so that columns stay narrow."""
    return f"{time:,.{3 if time < 10 else 2 if time < 100 else 1}f}"


def _or_untold(figure: float | None, unit: float, form: str, sign: str = "") -> str:
    """A figure in a unit, or a dash where the backend does not tell."""
    return "–" if figure is None else f"{figure * unit:{form}}{sign}"
