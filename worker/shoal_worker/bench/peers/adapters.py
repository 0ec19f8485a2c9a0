"""Each engine as a peer, as its own documentation shows it for throughput.

All draw with top-k 50 at temperature 1, and none stops before it has made what was asked for. An
engine is imported only when it is loaded.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal_worker.bench.peers.protocol import Setup

TOP_K = 50
# What each was fastest with of several: rows of a padded batch, and sequences at once.
BATCH_ROWS = {"cpu": 64, "cuda": 512}
SEQUENCES = {"cpu": 256, "cuda": 1024}


class Shoal:
    """Its engine in-process, as `shoal_worker.Generator` runs it."""

    def __init__(self, setup: Setup) -> None:
        from shoal_worker import Generator

        self._generator = Generator(
            **{
                "device": setup.device,
                "dtype": setup.dtype,
                "threads": setup.threads,
                **setup.settings,
                "model": setup.model,
            }
        )
        self.differs = ""

    def generate(self, prompts: list[list[int]], new_tokens: list[int]) -> list[int]:
        """All prompts as bulk requests."""
        from shoal.wire import GenerationRequest, SamplingParams

        results = self._generator.generate(
            GenerationRequest(
                prompt=prompt,
                sampling=SamplingParams(max_tokens=wanted, top_k=TOP_K, seed=i, ignore_eos=True),
            )
            for i, (prompt, wanted) in enumerate(zip(prompts, new_tokens, strict=True))
        )
        return [result.usage.completion_tokens for result in results]


class TransformersGenerate:
    """`generate` on padded batches, sorted so that rows of a batch end together."""

    def __init__(self, setup: Setup) -> None:
        import torch

        self._model = _transformers_model(setup)
        self._torch = torch
        self._rows = BATCH_ROWS[setup.kind]
        self.differs = f"batches of {self._rows}, lengths known before"

    def generate(self, prompts: list[list[int]], new_tokens: list[int]) -> list[int]:
        """Batch after batch."""
        made = [0] * len(prompts)
        for rows in _batches(prompts, new_tokens, self._rows):
            length, wanted = max(len(prompts[i]) for i in rows), max(new_tokens[i] for i in rows)
            padding = [length - len(prompts[i]) for i in rows]
            tokens = self._tensor(
                [[0] * n + prompts[i] for n, i in zip(padding, rows, strict=True)]
            )
            mask = self._tensor([[0] * n + [1] * (length - n) for n in padding])
            output = self._model.generate(
                tokens,
                attention_mask=mask,
                max_new_tokens=wanted,
                do_sample=True,
                top_k=TOP_K,
                pad_token_id=0,
            )
            for i in rows:
                made[i] = min(new_tokens[i], output.shape[1] - length)
        return made

    def _tensor(self, rows: list[list[int]]) -> Any:
        return self._torch.tensor(rows, device=self._model.device)


class TransformersBatch:
    """`generate_batch`'s manager, which takes each prompt's own length."""

    def __init__(self, setup: Setup) -> None:
        self._model = _transformers_model(setup)
        self._kind = setup.kind
        self.differs = "paged cache"

    def generate(self, prompts: list[list[int]], new_tokens: list[int]) -> list[int]:
        """All prompts to the manager, and all results back."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        paging = ContinuousBatchingConfig()
        if self._kind == "cpu":
            # Else it takes most of the machine's memory, anew in each call.
            lengths = sorted(map(len, prompts))[-SEQUENCES["cpu"] :]
            pages = 2 + (lengths[-1] + max(new_tokens)) // paging.page_size
            paging.num_blocks = pages * len(lengths)
        config = GenerationConfig(
            do_sample=True, top_k=TOP_K, max_new_tokens=max(new_tokens), eos_token_id=-1
        )
        made = [0] * len(prompts)
        with self._model.continuous_batching_context_manager(
            config, continuous_batching_config=paging, timeout=5
        ) as manager:
            for i, (prompt, wanted) in enumerate(zip(prompts, new_tokens, strict=True)):
                manager.add_request(prompt, request_id=str(i), max_new_tokens=wanted)
            left = len(prompts)
            while left and manager.is_running():
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    made[int(result.request_id)] = len(result.generated_tokens)
                    left -= 1
        return made


class OpenVinoGenAI:
    """Its pipeline for continuous batching, on token ids.

    Args:
        cache: number format of keys and values; u8 is its own choice.
    """

    def __init__(self, setup: Setup, cache: str = "u8") -> None:
        import openvino
        import openvino_genai

        if setup.converted is None and not (Path(setup.model) / "openvino_model.xml").exists():
            raise RuntimeError(
                "needs the model in OpenVINO's format: optimum-cli export openvino --model FOLDER "
                "OUT, then --converted openvino=OUT"
            )
        self._openvino, self._genai = openvino, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs = SEQUENCES["cpu"]
        scheduler.cache_size = 4
        precision = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[setup.dtype]
        properties = {
            "INFERENCE_NUM_THREADS": setup.threads,
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": cache,
        }
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            setup.converted or setup.model, scheduler, "CPU", properties
        )
        self.differs = f"{cache} cache"

    def generate(self, prompts: list[list[int]], new_tokens: list[int]) -> list[int]:
        """All prompts in one call."""
        configs = [self._config(wanted) for wanted in new_tokens]
        tensors = [self._openvino.Tensor(_as_rows(prompt)) for prompt in prompts]
        results = self._pipeline.generate(tensors, configs)
        return [len(result.m_generation_ids[0]) for result in results]

    def _config(self, wanted: int) -> Any:
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos = wanted, True
        config.do_sample, config.top_k, config.temperature = True, TOP_K, 1.0
        return config


class CTranslate2:
    """Its generator on batches of its own making, sorted so that rows of a batch end together."""

    def __init__(self, setup: Setup) -> None:
        import ctranslate2

        self._tokens = _token_texts(Path(setup.model))
        self._rows = BATCH_ROWS[setup.kind]
        with tempfile.TemporaryDirectory() as folder:
            converted = setup.converted
            if converted is None:
                converted = str(Path(folder) / "model")
                ctranslate2.converters.TransformersConverter(setup.model).convert(converted)
                _name_special_tokens(Path(converted) / "config.json")
            self._generator = ctranslate2.Generator(
                converted,
                device=setup.kind,
                compute_type=setup.dtype,
                inter_threads=1,
                intra_threads=setup.threads,
            )
        self.differs = f"batches of {self._rows}, lengths known before"

    def generate(self, prompts: list[list[int]], new_tokens: list[int]) -> list[int]:
        """Batch after batch."""
        made = [0] * len(prompts)
        for rows in _batches(prompts, new_tokens, self._rows):
            wanted = max(new_tokens[i] for i in rows)
            results = self._generator.generate_batch(
                [[self._tokens[token] for token in prompts[i]] for i in rows],
                max_batch_size=0,
                max_length=wanted,
                min_length=wanted,
                sampling_topk=TOP_K,
                sampling_temperature=1.0,
                include_prompt_in_result=False,
            )
            for i, result in zip(rows, results, strict=True):
                made[i] = min(new_tokens[i], len(result.sequences_ids[0]))
        return made


class VLLM:
    """Its offline engine."""

    def __init__(self, setup: Setup) -> None:
        import vllm

        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{setup.threads - 1}")
        self._sampling: Callable[..., Any] = vllm.SamplingParams
        self._engine = vllm.LLM(
            setup.model,
            dtype=setup.dtype,
            max_num_seqs=SEQUENCES[setup.kind],
            enable_prefix_caching=False,
        )
        self.differs = "paged cache"

    def generate(self, prompts: list[list[int]], new_tokens: list[int]) -> list[int]:
        """All prompts in one call."""
        outputs = self._engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [self._sampling(max_tokens=n, top_k=TOP_K, ignore_eos=True) for n in new_tokens],
            use_tqdm=False,
        )
        return [len(output.outputs[0].token_ids) for output in outputs]


def _transformers_model(setup: Setup) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(setup.threads)
    model: Any = AutoModelForCausalLM.from_pretrained(
        setup.model, dtype=getattr(torch, setup.dtype)
    )
    model.generation_config.eos_token_id = None
    return model.to(setup.device).eval()


def _batches(prompts: list[list[int]], new_tokens: list[int], rows: int) -> list[list[int]]:
    """Indices in groups of alike lengths, longest first."""
    order = sorted(range(len(prompts)), key=lambda i: (-new_tokens[i], -len(prompts[i])))
    return [order[start : start + rows] for start in range(0, len(order), rows)]


def _as_rows(prompt: list[int]) -> Any:
    import numpy as np

    return np.array([prompt], dtype=np.int64)


def _name_special_tokens(config: Path) -> None:
    """A tokenizer need not have all special tokens; CTranslate2 reads a text for each."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    named = {key: "" if value is None else value for key, value in settings.items()}
    config.write_text(json.dumps(named), encoding="utf-8")


def _token_texts(model: Path) -> dict[int, str]:
    """Each token id's text in the vocabulary."""
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    texts = {token_id: text for text, token_id in tokenizer["model"]["vocab"].items()}
    return texts | {added["id"]: added["content"] for added in tokenizer["added_tokens"]}
