"""What the device reaches: its memory's bandwidth and its rate of matrix products, measured here.

Each is the best of several tries, for a ceiling is what was reached once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from shoal_worker.bench.breakdown import timed_ms
from shoal_worker.bench.roofline import Ceilings, ModelSize
from shoal_worker.engine import LoadedModel
from shoal_worker.engine.native import NativeUnavailable
from shoal_worker.engine.native_ops import packed, product
from shoal_worker.engine.packed import pays
from shoal_worker.engine.probe import probe

_TRIES = 5
# Far over any cache, and products large enough to be bound by arithmetic.
_BYTES = {"cpu": 2**28, "cuda": 2**30}
_WIDTH = {"cpu": 2048, "cuda": 8192}


@torch.inference_mode()
def measured_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """What `device` reaches now, with products of `dtype`."""
    kind = device.type
    read_ms, copy_ms = _memory_ms(_BYTES[kind], device)
    # Not ones or zeros, on which some processors are faster than on anything else.
    factor = torch.randn(_WIDTH[kind], _WIDTH[kind], device=device).to(dtype)
    products = [lambda: factor @ factor]
    if kind == "cpu" and (native_product := _native_product(factor)):
        products.append(native_product)
    product_ms = min(_best_ms(product, device) for product in products)
    return Ceilings(
        bytes_per_s=1000 * max(_BYTES[kind] / read_ms, 2 * _BYTES[kind] / copy_ms),
        operations_per_s=1000 * 2 * _WIDTH[kind] ** 3 / product_ms,
    )


def _native_product(factor: Tensor) -> Callable[[], Tensor] | None:
    """The same product by our native code, where the engine would use it."""
    try:
        if not pays(factor.dtype):
            return None
        panels = packed(factor)
    except NativeUnavailable:
        return None
    width, dtype = len(factor), factor.dtype
    return lambda: product(factor, panels, None, None, width, dtype)


def _memory_ms(num_bytes: int, device: torch.device) -> tuple[float, float]:
    """Of a read and of a copy of so many bytes."""
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return _best_ms(source.sum, device), _best_ms(lambda: target.copy_(source), device)


def _best_ms(call: Callable[[], object], device: torch.device) -> float:
    call()
    return min(timed_ms(call, device, num_calls=1) for _ in range(_TRIES))


def size_of(loaded: LoadedModel) -> ModelSize:
    """What a model costs, by its configuration; the engine may have packed its weights anew."""
    config = loaded.model.config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, PreTrainedModel)
    output = model.get_output_embeddings()
    looked_up = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    multiplied = [
        weight
        for weight in model.parameters()
        if weight.dim() == 2 and id(weight) not in looked_up and weight is not output.weight
    ]
    text_config = config.get_text_config(decoder=True)
    shapes = probe(loaded.model)
    head_dim = shapes[0].key_dim
    return ModelSize(
        block_weights=sum(weight.numel() for weight in multiplied),
        output_weights=output.weight.numel(),
        bytes_per_weight=loaded.dtype.itemsize,
        layers=len(shapes),
        attention_width=text_config.num_attention_heads * head_dim,
        kv_bytes_per_token=sum(shape.bytes_per_token for shape in shapes),
    )
