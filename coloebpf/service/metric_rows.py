"""Metric families out of rows, as both halves of the metrics need them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

Rows = Iterable[tuple[Sequence[str], float]]


def gauge(name: str, text: str, rows: Rows, labels: Sequence[str] = ()) -> Metric:
    """What goes up and down; a row is the labels' values and a number."""
    family = GaugeMetricFamily(f"coloebpf_{name}", text, labels=labels)
    for values, number in rows:
        family.add_metric(values, float(number))
    return family


def counter(name: str, text: str, rows: Rows, labels: Sequence[str] = ()) -> Metric:
    """What only grows, likewise."""
    family = CounterMetricFamily(f"coloebpf_{name}", text, labels=labels)
    for values, number in rows:
        family.add_metric(values, float(number))
    return family
