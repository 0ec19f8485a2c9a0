"""Where a model's files are: bundled, in a local folder, or fetched from the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from shoal.errors import ModelError
from shoal_worker.engine.support import one_line

_DEMO = "demo"
_BUNDLED = Path(__file__).parent.parent / "models"
_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model"]
# Other frameworks' files lie in subfolders; "consolidated" is a second copy of the weights.
_IGNORED_PATTERNS = ["*/*", "consolidated*"]

# Errors of the HTTP library in use pass through the hub's client; their class is a base there.
_HUB_ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, *HfHubHTTPError.__bases__)


def located(model: str) -> tuple[str, Path]:
    """The name that a model is served as, and its folder.

    Raises:
        ModelError: there is no such folder and no such model on the hub.
    """
    if not model:
        raise ModelError("no model is named; name a folder, a hub id or 'demo'")
    if model == _DEMO:
        return model, _bundled(model)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve().name, folder
    if folder.exists():
        raise ModelError(f"model {model!r} is a file; name the folder that holds it")
    if _looks_like_path(model):
        raise ModelError(
            f"model {model!r} does not exist; name a folder written by save_pretrained"
        )
    return model, _fetched(model)


def _bundled(name: str) -> Path:
    folder = _BUNDLED / name
    if not folder.is_dir():
        raise ModelError(f"the bundled model {name!r} is missing: install shoal[worker] again")
    return folder


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "~", os.sep)) or model.count("/") > 1


def _fetched(model: str) -> Path:
    try:
        folder = snapshot_download(
            model, allow_patterns=_PATTERNS, ignore_patterns=_IGNORED_PATTERNS
        )
    except GatedRepoError:
        raise ModelError(
            f"model {model!r} is gated: accept its terms on the hub and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"model {model!r} is neither a folder here nor a public model on the hub; "
            "check the name, or set HF_TOKEN for a private one"
        ) from None
    except _HUB_ERRORS as error:
        raise ModelError(
            f"model {model!r} is no folder here and could not be fetched from the hub "
            f"({one_line(_root(error))}); name a local folder or check the network"
        ) from None
    return Path(folder)


def _root(error: BaseException) -> BaseException:
    """What began it: the hub's client wraps a fault of the network in paragraphs of advice."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error
