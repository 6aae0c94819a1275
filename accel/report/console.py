"""The closing table of a run, for a reader at a console."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

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
    table = Table(title=title, expand=False)
    table.add_column("layer")
    table.add_column("chain")
    table.add_column("ranks")
    for column in ("MMACs before", "after", "response error"):
        table.add_column(column, justify="right")
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
            f" {time['speedup']:.2f}× measured"
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
