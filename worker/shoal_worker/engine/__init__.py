"""The engine: a model, its lanes' caches and the sampler, behind `prefill` and `decode`."""

from shoal_worker.engine.engine import Engine
from shoal_worker.engine.model import LoadedModel, load_model

__all__ = ["Engine", "LoadedModel", "load_model"]
