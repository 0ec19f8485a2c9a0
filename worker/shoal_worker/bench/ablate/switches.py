"""Every optimisation as a pair of arms, on and off, with all else at default; and what is claimed.

A new option of the engine is one more `of_setting(...)` in `_engine`. Pure data.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from shoal_worker.bench.ablate.arms import DEFAULT, TopK
from shoal_worker.bench.ablate.switch import Claim, Switch, of_setting

_EAGER = replace(DEFAULT, attention="eager")
_ATTENTIONS_OFF = (
    Claim("5–10% faster", "tokens_per_s", 1.05, 1.10),
    Claim("10–15% less memory", "peak_bytes", 1 / 0.9, 1 / 0.85),
)
_TOP_K_TITLES: dict[TopK, str] = {
    "ordered": "our draw against topk in [rows, k]",
    "scatter": "our draw against scatter",
    "mask": "our draw against mask",
    "sort": "our draw against sort",
}


def switches(default_dtype: str) -> tuple[Switch, ...]:
    """All of them.

    Args:
        default_dtype: what the device's default is, such as "float32".
    """
    return (*_controls(), *_text_and_loading(), *_torch(default_dtype), *_model(), *_engine())


def _controls() -> Iterable[Switch]:
    yield Switch(
        "control",
        "control: the default twice",
        DEFAULT,
        DEFAULT,
        "default",
        "default again, in another process",
    )


def _text_and_loading() -> Iterable[Switch]:
    yield Switch(
        "low-memory-loading",
        "low-memory loading",
        DEFAULT,
        replace(DEFAULT, loading="state_dict"),
        "weights taken from the mapped file",
        "model initialised, then load_state_dict",
        kind="loading",
        claims=(Claim("20–30% less peak memory", "peak_rss_bytes", 1 / 0.8, 1 / 0.7),),
    )
    yield Switch(
        "fast-tokenizer",
        "fast tokenizer",
        DEFAULT,
        replace(DEFAULT, tokenising="python"),
        "tokenizers (Rust), prompts one by one",
        "the same BPE in Python",
        kind="tokenising",
        claims=(Claim("2–5× faster", "tokenised_per_s", 2, 5),),
    )
    yield Switch(
        "batched-tokenising",
        "batched tokenising",
        replace(DEFAULT, tokenising="batched"),
        DEFAULT,
        "all prompts in one call",
        "prompts one by one",
        kind="tokenising",
    )


def _torch(default_dtype: str) -> Iterable[Switch]:
    yield Switch(
        "inference-mode",
        "inference_mode",
        DEFAULT,
        replace(DEFAULT, inference_mode=False),
        "torch.inference_mode",
        "torch.no_grad",
        claims=(Claim("5–10% faster", "tokens_per_s", 1.05, 1.10),),
    )
    # These precisions are of float32 products; without those there is nothing to compare.
    exact = DEFAULT if default_dtype == "float32" else DEFAULT.with_settings(dtype="float32")
    for precision in ("high", "medium"):
        yield of_setting(
            f"matmul-{precision}",
            f"float32 matmul precision {precision}",
            "matmul_precision",
            on=precision,
            on_text=precision,
            off_text="highest",
            base=exact,
            claims=(Claim("10–20% faster", "tokens_per_s", 1.10, 1.20),),
        )
    yield of_setting(
        "cudnn-benchmark",
        "cudnn.benchmark",
        "cudnn_benchmark",
        off=False,
        on_text="on",
        off_text="off",
        claims=(Claim("10–30% faster on repeating shapes", "tokens_per_s", 1.10, 1.30),),
    )
    reduced = default_dtype != "float32"
    yield Switch(
        "dtype",
        "bfloat16",
        DEFAULT if reduced else DEFAULT.with_settings(dtype="bfloat16"),
        exact,
        default_dtype if reduced else "bfloat16",
        "float32",
        setting="dtype",
    )


def _model() -> Iterable[Switch]:
    yield Switch(
        "kv-cache",
        "KV cache",
        DEFAULT,
        replace(DEFAULT, kv_cache=False),
        "keys and values kept",
        "prompt and completion read again at every step",
        claims=(
            Claim("5–10× on later tokens", "inter_token_s", 5, 10),
            Claim("about 73 KB a token (GPT-2 small, float32)", "kv_bytes_per_token", 72e3, 74e3),
        ),
    )
    yield Switch(
        "attentions-off",
        "attention outputs off",
        DEFAULT,
        replace(_EAGER, keep_attentions=True),
        "the engine's attention, which makes no weights",
        "eager attention, weights returned",
        claims=_ATTENTIONS_OFF,
    )
    yield Switch(
        "attentions-dropped",
        "attention outputs off, eager in both",
        _EAGER,
        replace(_EAGER, keep_attentions=True),
        "eager attention, weights dropped",
        "eager attention, weights returned",
        claims=_ATTENTIONS_OFF,
    )
    yield Switch(
        "hidden-states-off",
        "hidden states off",
        DEFAULT,
        replace(DEFAULT, keep_hidden_states=True),
        "dropped",
        "returned",
        claims=(
            Claim("2–5% faster", "tokens_per_s", 1.02, 1.05),
            Claim("5–10% less memory", "peak_bytes", 1 / 0.95, 1 / 0.9),
        ),
    )
    yield Switch(
        "fused-attention",
        "fused attention",
        DEFAULT,
        _EAGER,
        "the engine's own",
        "eager: scores, softmax, product",
    )
    yield of_setting(
        "kernels",
        "our own kernels",
        "kernels",
        off=False,
        on_text="Triton's on a GPU, native code on a CPU: attention, drawing, products",
        off_text="torch's: scaled_dot_product_attention under a mask, topk, its products",
    )
    yield from _top_k()


def _top_k() -> Iterable[Switch]:
    ways: dict[TopK, str] = {
        "ordered": "torch.topk and gather in [rows, k], ties by token id",
        "scatter": "topk, scattered back to the vocabulary",
        "mask": "vocabulary masked below the k-th value",
        "sort": "whole vocabulary sorted",
    }
    for way, text in ways.items():
        yield Switch(
            f"top-k-{way}",
            f"top-k: {_TOP_K_TITLES[way]}",
            DEFAULT,
            replace(DEFAULT, top_k=way),
            "the engine's own draw",
            text,
        )
    yield Switch(
        "unordered-ties",
        "top-k: ties in any order",
        replace(DEFAULT, top_k="unordered"),
        replace(DEFAULT, top_k="ordered"),
        "torch.topk as it is",
        ways["ordered"],
    )
    yield Switch(
        "scatter-against-mask",
        "top-k: scatter against mask",
        replace(DEFAULT, top_k="scatter"),
        replace(DEFAULT, top_k="mask"),
        ways["scatter"],
        ways["mask"],
        claims=(Claim("20–30% faster", "tokens_per_s", 1.20, 1.30),),
    )


def _engine() -> Iterable[Switch]:
    yield Switch(
        "length-grouping",
        "length grouping",
        DEFAULT,
        replace(DEFAULT, grouping=False),
        "prompts padded to their bucket; on a CPU also a short and a long lane",
        "one lane and one bucket, as long as the longest",
        setting="lanes",
    )
    yield Switch(
        "lanes-by-length",
        "lanes by length",
        replace(DEFAULT, lanes_by_length=True),
        DEFAULT,
        "a short and a long lane, in turn",
        "one long lane",
        setting="lanes",
        only_on="cuda",
    )
    yield Switch(
        "slot-refill",
        "slot refill",
        DEFAULT,
        replace(DEFAULT, refill=False),
        "a finished slot is refilled",
        "a batch ends before the next begins",
    )
    yield of_setting(
        "int8-kv",
        "int8 keys and values",
        "kv_dtype",
        on="int8",
        on_text="cached in int8",
        off_text="cached as computed",
        only_on="cpu",
    )
    yield of_setting(
        "compile",
        "torch.compile",
        "compile",
        on=True,
        on_text="decode step compiled",
        off_text="eager",
    )
    yield of_setting(
        "cuda-graphs",
        "CUDA graphs",
        "cuda_graphs",
        off=False,
        on_text="a step's kernels launched as one",
        off_text="launched one by one",
        only_on="cuda",
    )
    yield of_setting(
        "decode-steps",
        "several steps a look",
        "decode_steps",
        off=1,
        on_text="4 tokens between two looks",
        off_text="1",
        only_on="cuda",
    )
    yield of_setting(
        "run-ahead",
        "run ahead",
        "run_ahead",
        off=False,
        on_text="next steps launched before the last are read",
        off_text="read first",
        only_on="cuda",
    )
