"""Families: weights in buckets, known label values at 0, one name once."""

from __future__ import annotations

from threading import Thread

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from shoal_worker.families import Declaration, WeightedHistogram, WeightedSeries


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_a_weight_counts_as_so_many_observations() -> None:
    series = WeightedSeries((1.0, 2.0))

    series.observe(0.5, 3)
    series.observe(1.5, 4)
    series.observe(9.0, 2)

    assert series.read() == ([3, 7, 9], 0.5 * 3 + 1.5 * 4 + 9.0 * 2)


def test_a_value_on_a_bound_belongs_to_the_bucket_below_it() -> None:
    series = WeightedSeries((1.0, 2.0))

    series.observe(1.0)

    assert series.read()[0] == [1, 1, 1]


def test_a_weighted_histogram_is_written_as_prometheus_writes_its_own(
    registry: CollectorRegistry,
) -> None:
    plain = CollectorRegistry()
    bounds = (0.00005, 0.0005, 1, 30.0)
    own = Declaration(registry, "gpt2").histogram("x_seconds", "X.", bounds, lane=["a"])
    labels = ("model_name", "lane")
    theirs = Histogram("shoal_x_seconds", "X.", labels, registry=plain, buckets=bounds)

    for value in (0.0001, 0.0005, 0.5, 99.0):
        own("a").observe(value)
        theirs.labels("gpt2", "a").observe(value)

    assert _lines(registry) == _lines(plain)


def test_observations_of_many_threads_all_count() -> None:
    series = WeightedSeries((1.0,))

    def observe() -> None:
        for _ in range(5_000):
            series.observe(0.5, 2)

    threads = [Thread(target=observe) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert series.read() == ([40_000, 40_000], 20_000)


def test_a_read_shows_whole_observations_while_others_are_made() -> None:
    series = WeightedSeries((1.0,))

    def observe() -> None:
        for _ in range(20_000):
            series.observe(0.5, 2)

    thread = Thread(target=observe)
    thread.start()

    while thread.is_alive():
        weights, weighted_sum = series.read()
        assert weighted_sum == weights[-1] / 2


def test_known_label_values_stand_at_0_in_every_combination(registry: CollectorRegistry) -> None:
    Declaration(registry, "gpt2").counter("x_total", "X.", queue=["a", "b"], code=["1", "2"])

    values = [
        registry.get_sample_value("shoal_x_total", _labels(queue=queue, code=code))
        for queue in "ab"
        for code in "12"
    ]

    assert values == [0, 0, 0, 0]


def test_a_family_without_other_labels_stands_at_0(registry: CollectorRegistry) -> None:
    Declaration(registry, "gpt2").gauge("x_ratio", "X.")

    assert registry.get_sample_value("shoal_x_ratio", _labels()) == 0


def test_a_label_value_met_later_gets_its_series(registry: CollectorRegistry) -> None:
    family = Declaration(registry, "gpt2").counter("x_total", "X.", queue=["a"])

    family("b").inc(2)

    assert registry.get_sample_value("shoal_x_total", _labels(queue="b")) == 2


def test_a_name_cannot_be_declared_twice(registry: CollectorRegistry) -> None:
    def declare() -> None:
        WeightedHistogram("x_seconds", "X.", (), buckets=(1.0,), registry=registry)

    declare()

    with pytest.raises(ValueError, match="x_seconds"):
        declare()


def _labels(**labels: str) -> dict[str, str]:
    return {"model_name": "gpt2", **labels}


def _lines(registry: CollectorRegistry) -> list[str]:
    lines = generate_latest(registry).decode().splitlines()
    return [line for line in lines if "_created" not in line]
