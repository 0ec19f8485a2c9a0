"""What a measuring process does: take one role, then answer questions until its pipe ends."""

from __future__ import annotations

import logging
import platform
from contextlib import ExitStack
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from shoal.errors import ShoalError
from shoal_worker.bench.ablate.processes import Spec
from shoal_worker.bench.ablate.tokenising import TokenisingTrial
from shoal_worker.bench.ablate.trial import ServingTrial
from shoal_worker.bench.random_models import save_random_model
from shoal_worker.engine.fingerprint import hardware
from shoal_worker.engine.source import located
from shoal_worker.garbage import settle


def play(connection: Connection[Any, Any], role: str, argument: Any) -> None:
    """Say what the role gives at first, then answer what is asked.

    Every answer is a pair: whether it failed, and the answer or the error's text.
    """
    logging.disable(logging.WARNING)
    with ExitStack() as stack:
        try:
            first, subject = _ROLES[role](argument, stack)
            connection.send((False, first))
            while True:
                question = connection.recv()
                connection.send((False, getattr(subject, question)()))
        except EOFError:
            return
        except ShoalError as error:
            connection.send((True, str(error)))
        # The edge of the process: whatever it is, the one who measures must hear of it.
        except Exception as error:  # noqa: BLE001
            connection.send((True, f"{type(error).__name__}: {error}"))


def _load_trial(spec: Spec, stack: ExitStack) -> tuple[float, ServingTrial | TokenisingTrial]:
    if spec.kind == "tokenising":
        _, folder = located(spec.tokenizer)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ShoalError(f"model {spec.tokenizer!r} has no fast tokenizer")
        return 0.0, TokenisingTrial(tokenizer, spec.load.texts(), spec.arm.tokenising)
    # The first round warms up what the workload needs; lanes have many more shapes than that.
    trial = ServingTrial(spec.model, spec.device, spec.arm, spec.load, stack, warm_up=False)
    # As a worker's engine process does it.
    settle()
    return trial.load_s, trial


def _write_model(argument: tuple[str, str], _: ExitStack) -> tuple[None, None]:
    shape, folder = argument
    save_random_model(shape, Path(folder))
    return None, None


def _look_around(device: str, _: ExitStack) -> tuple[dict[str, Any], None]:
    on_gpu = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    found = torch.device("cuda" if on_gpu else "cpu") if device == "auto" else torch.device(device)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shoal": version("shoal"),
    }
    if on_gpu:
        versions["cuda"] = str(torch.version.cuda)
    return {
        "hardware": hardware(found),
        "device": found.type,
        "threads": None if on_gpu else torch.get_num_threads(),
        "versions": versions,
    }, None


_ROLES: dict[str, Any] = {
    "load_trial": _load_trial,
    "write_model": _write_model,
    "look_around": _look_around,
}
