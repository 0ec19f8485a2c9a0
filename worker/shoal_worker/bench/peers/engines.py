"""Which engines there are, and what is known of each without loading it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

from shoal_worker.bench.peers import adapters
from shoal_worker.bench.peers.protocol import Peer, Setup


@dataclass(frozen=True)
class Engine:
    """What is known of an engine without loading it.

    Attributes:
        modules: that it needs; distribution: whose version is shown.
        install: how to get it.
        devices: kinds that its adapter runs on.
    """

    title: str
    load: Callable[[Setup], Peer]
    modules: tuple[str, ...]
    distribution: str
    install: str
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def is_installed(self) -> bool:
        """Whether this interpreter has its modules."""
        return all(find_spec(module) is not None for module in self.modules)


ENGINES = {
    "shoal": Engine(
        "Shoal", adapters.Shoal, ("shoal_worker", "shoal"), "shoal", 'pip install "shoal[worker]"'
    ),
    "transformers": Engine(
        "transformers generate",
        adapters.TransformersGenerate,
        ("transformers", "torch"),
        "transformers",
        "pip install transformers torch",
    ),
    "transformers-batch": Engine(
        "transformers generate_batch",
        adapters.TransformersBatch,
        ("transformers", "torch"),
        "transformers",
        "pip install transformers torch",
    ),
    "openvino": Engine(
        "OpenVINO GenAI",
        adapters.OpenVinoGenAI,
        ("openvino_genai",),
        "openvino-genai",
        "pip install openvino-genai",
        devices=("cpu",),
    ),
    "openvino-f16": Engine(
        "OpenVINO GenAI, 16-bit cache",
        partial(adapters.OpenVinoGenAI, cache="f16"),
        ("openvino_genai",),
        "openvino-genai",
        "pip install openvino-genai",
        devices=("cpu",),
    ),
    "ctranslate2": Engine(
        "CTranslate2",
        adapters.CTranslate2,
        ("ctranslate2", "transformers", "torch"),
        "ctranslate2",
        "pip install ctranslate2 transformers torch",
    ),
    "vllm": Engine("vLLM", adapters.VLLM, ("vllm",), "vllm", "pip install vllm"),
}
