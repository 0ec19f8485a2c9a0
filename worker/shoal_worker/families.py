"""Prometheus families, declared once: prefix, `model_name`, every known label value at 0.

Owns how a metric is declared, and the histogram whose observations have a weight. It does not know
which metrics there are.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from itertools import accumulate, product
from threading import Lock
from typing import Protocol, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

PREFIX = "shoal_"

Series_co = TypeVar("Series_co", covariant=True)


class WeightedSeries:
    """Weights by bucket; observed in one thread, read in another."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._weights = [0.0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = Lock()

    def observe(self, value: float, weight: float = 1) -> None:
        """Count `value` as if it had been observed `weight` times."""
        bucket = bisect_left(self._bounds, value)
        with self._lock:
            self._weights[bucket] += weight
            self._sum += value * weight

    def read(self) -> tuple[list[float], float]:
        """The weight at or below each bound, last that of all, and the weighted sum of values."""
        with self._lock:
            weights, weighted_sum = list(self._weights), self._sum
        return list(accumulate(weights)), weighted_sum


class WeightedHistogram(Collector):
    """A histogram whose observations have a weight, which prometheus_client's have not.

    A step of 512 rows is 512 intervals between tokens: this counts them at the cost of one. And it
    finds a bucket by bisection, so that even one of weight 1 costs about half of theirs.
    """

    def __init__(
        self,
        name: str,
        documentation: str,
        labelnames: Sequence[str],
        *,
        buckets: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        self._family = partial(HistogramMetricFamily, name, documentation, labels=labelnames)
        self._bounds = tuple(buckets)
        self._series: dict[tuple[str, ...], WeightedSeries] = {}
        registry.register(self)

    def labels(self, *values: str) -> WeightedSeries:
        """The series with these label values, in the order of the label names."""
        return self._series.setdefault(values, WeightedSeries(self._bounds))

    def describe(self) -> Iterable[HistogramMetricFamily]:
        """The name alone, by which the registry finds collisions."""
        return [self._family()]

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """The family with all its series, as of now."""
        family = self._family()
        names = [*(repr(float(bound)) for bound in self._bounds), "+Inf"]
        for values, series in list(self._series.items()):
            weights, weighted_sum = series.read()
            family.add_metric(values, list(zip(names, weights, strict=True)), weighted_sum)
        return [family]


class _Family(Protocol[Series_co]):
    def labels(self, *values: str) -> Series_co: ...


class Declaration:
    """Declares families in one registry, each with `model_name` as its first label.

    A family is given back as a callable from its other label values to their series. Label values
    known beforehand are passed here, and their series stand at 0 at once: a counter that appears
    with its first increase hides it from `rate`.
    """

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._registry = registry
        self._model_name = model_name

    def counter(self, name: str, text: str, **labels: Iterable[str]) -> Callable[..., Counter]:
        """A count that only grows."""
        names = ("model_name", *labels)
        return self._series(Counter(PREFIX + name, text, names, registry=self._registry), labels)

    def gauge(self, name: str, text: str, **labels: Iterable[str]) -> Callable[..., Gauge]:
        """A value that goes up and down."""
        names = ("model_name", *labels)
        return self._series(Gauge(PREFIX + name, text, names, registry=self._registry), labels)

    def histogram(
        self, name: str, text: str, bounds: Sequence[float], **labels: Iterable[str]
    ) -> Callable[..., WeightedSeries]:
        """Observations by bucket, each with a weight."""
        names = ("model_name", *labels)
        family = WeightedHistogram(
            PREFIX + name, text, names, buckets=bounds, registry=self._registry
        )
        return self._series(family, labels)

    def _series(
        self, family: _Family[Series_co], labels: Mapping[str, Iterable[str]]
    ) -> Callable[..., Series_co]:
        # `labels` costs a microsecond a call, the cache a twentieth of it.
        series = cache(partial(family.labels, self._model_name))
        for values in product(*labels.values()):
            series(*values)
        return series
