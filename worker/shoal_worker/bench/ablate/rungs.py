"""The waterfall: from the naive loop to the default, one change at a time. Pure data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from shoal_worker.bench.ablate.arms import DEFAULT, Arm

NAIVE = Arm(
    inference_mode=False,
    kv_cache=False,
    attention="eager",
    keep_attentions=True,
    keep_hidden_states=True,
    top_k="sort",
    grouping=False,
    refill=False,
    slots=1,
)
# What changes last, in this order: settings at what the naive loop does.
_SETTINGS: dict[str, tuple[Any, str]] = {
    "dtype": ("float32", "bfloat16"),
    "kernels": (False, "our own kernels"),
    "cuda_graphs": (False, "CUDA graphs"),
    "decode_steps": (1, "several steps a look"),
    "run_ahead": (False, "run ahead"),
}
_ON_CPU = ("kernels",)


@dataclass(frozen=True, slots=True)
class Rung:
    """The arm that a change leads to, from the rung before."""

    title: str
    arm: Arm


def rungs(*, on_gpu: bool, default_dtype: str) -> list[Rung]:
    """From the naive loop to the default, which is the last."""
    names = [name for name in _SETTINGS if on_gpu or name in _ON_CPU]
    if default_dtype != "float32" and "dtype" not in names:
        names.insert(0, "dtype")
    if default_dtype == "float32":
        names = [name for name in names if name != "dtype"]
    arm = NAIVE.with_settings(**{name: _SETTINGS[name][0] for name in names})
    climbed = [Rung("naive loop: one prompt, no cache, all outputs", arm)]

    def climb(title: str, arm: Arm) -> None:
        climbed.append(Rung(title, arm))

    climb("hidden states off", replace(climbed[-1].arm, keep_hidden_states=False))
    climb("attention outputs off", replace(climbed[-1].arm, keep_attentions=False))
    climb("fused attention", replace(climbed[-1].arm, attention="engine"))
    climb("inference_mode", replace(climbed[-1].arm, inference_mode=True))
    climb("top-k in [rows, k]", replace(climbed[-1].arm, top_k="engine"))
    climb("KV cache", replace(climbed[-1].arm, kv_cache=True))
    climb("many prompts at once", replace(climbed[-1].arm, slots=None))
    climb("length grouping", replace(climbed[-1].arm, grouping=True))
    climb("slot refill", replace(climbed[-1].arm, refill=True))
    for name in names:
        climb(_SETTINGS[name][1], climbed[-1].arm.without_setting(name))
    assert climbed[-1].arm == DEFAULT, "the last rung is the default"
    return climbed
