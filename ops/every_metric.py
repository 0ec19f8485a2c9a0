"""All metrics that a worker or the exporter has, from the code that exports them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from shoal.bulk.run_state import RunState
from shoal.exporter import Reading, families
from shoal.server_state import server_state
from shoal.status import QueueState
from shoal_worker.events import EngineLoaded
from shoal_worker.metrics import PrometheusMetrics

ENGINE_PROCESS = {
    f"shoal_engine_process_{stem}"
    for stem in ("cpu_seconds_total", "resident_memory_bytes", "start_time_seconds")
}


def worker_families() -> list[Metric]:
    """All families of a worker that has loaded a model."""
    registry = CollectorRegistry()
    metrics = PrometheusMetrics(registry, model_name="m", queues=["q"], lanes={"bulk-1x64": 1})
    metrics(EngineLoaded("m", "f", "cpu", "float32", 1.0, {"bulk-1x64": 1}))
    return list(registry.collect())


def exporter_families() -> list[Metric]:
    """All families of an exporter that sees a queue and a bulk run."""
    queue = QueueState("q", 0, None, {"failed": 0})
    run = RunState("r", "running", "out.jsonl", "q", 1, 0, 0, 1, 1.0, 1.0, eta_s=1.0)
    reading = Reading((queue,), {"q": 0}, (), (run,), server_state({}, 0.0))
    return list(families(reading, 0.0))


def worker_names() -> set[str]:
    """Series names of a worker."""
    return _names(worker_families()) | ENGINE_PROCESS


def exporter_names() -> set[str]:
    """Series names of an exporter."""
    return _names(exporter_families())


def _names(found: list[Metric]) -> set[str]:
    return {sample.name for family in found for sample in family.samples}
