"""The waterfall: from the naive loop to the default, one change at a time. Pure data."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
_NAIVE_ON_GPU = {
    "cuda_graphs": False,
    "decode_steps": 1,
    "dtype": "float32",
    "kernels": False,
    "run_ahead": False,
}


@dataclass(frozen=True, slots=True)
class Rung:
    """The arm that a change leads to, from the rung before."""

    title: str
    arm: Arm


def rungs(*, on_gpu: bool) -> list[Rung]:
    """From the naive loop to the default, which is the last."""
    arm = NAIVE.with_settings(**_NAIVE_ON_GPU) if on_gpu else NAIVE
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
    if on_gpu:
        for title, setting in (
            ("bfloat16", "dtype"),
            ("our kernels", "kernels"),
            ("CUDA graphs", "cuda_graphs"),
            ("several steps a look", "decode_steps"),
            ("run ahead", "run_ahead"),
        ):
            climb(title, climbed[-1].arm.without_setting(setting))
    assert climbed[-1].arm == DEFAULT, "the last rung is the default"
    return climbed
