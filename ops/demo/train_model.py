"""Train the bundled model `demo`: a small GPT-2 on the Python standard library's own prose.

Owns the whole path from an interpreter's docstrings to the model folder: corpus, tokenizer,
training and the held-out numbers its model card quotes, without network or data files.
Without an option it takes the corpus from the Python that runs it; otherwise:

    python ops/demo/train_model.py --write-corpus FILE  # only write the corpus
    python ops/demo/train_model.py --corpus FILE        # train on a corpus from another Python
"""

import argparse
import ast
import hashlib
import importlib
import json
import math
import random
import re
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel

DEFAULT_OUTPUT = Path(__file__).resolve().parents[2] / "worker/shoal_worker/models/demo"
END = "<|endoftext|>"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
END_ID = 0  # the trainer numbers special tokens first
CONTEXT = 512
HELD_OUT = 0.05
# Tests and demos hold little prose; bundled wheels and site-packages are not the library.
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "ensurepip", "turtledemo"}
# English has one of these every few words; code, tables and lists of names do not.
COMMON = re.compile(
    r"\b(?:an?|the|and|any|are|as|at|be|been|but|by|can|do|does|for|from|has|have|if|in|into|is|its?"
    r"|may|must|not?|of|on|one|only|or|other|over|returns?|same|should|so|such|than|that|then|there"
    r"|these|they|this|to|used|using|was|we|when|where|which|will|with|you)\b",
    re.IGNORECASE,
)
PLAIN = set(" ,.'();:-_")
TYPOGRAPHY = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014", "''\"\"--")
COMMENTS = re.compile(r"(?:^[ \t]*#.*\n){2,}", re.MULTILINE)
HEADING = re.compile(r"\n*^.*\n[=*~^-]{4,}\n", re.MULTILINE)
BULLET = r"\s*(?:[-*+]|\d+\.|\(?[a-z\d]\))\s+"
PARAGRAPH = re.compile(rf"\n\s*\n|\n(?={BULLET})")
# What stands before a sentence: a bullet, or the name alone above an indented description.
LEAD = re.compile(rf"^(?:{BULLET}|(\s*)\S+\n(?=\1\s+\S))")
ROLE = re.compile(r":[a-z:+-]+:`[~!]?([^`<]+?)(?:\s*<[^`>]*>)?`")
MARKED = re.compile(
    r"``([^`]+)``|`([^`']+)['`]|(?<![\w*])\*{1,2}([\w.][\w.' -]*)\*{1,2}(?![\w*])"
    r"|\"([^\s\"]+|\w+\([^\"]*)\""
)
NOTE = re.compile(
    r"\s*\[\d+\]_?(?!\w)|^(?:note|nb|(?:added|changed|deprecated)[^:.]*?version [\d., a-z]+):?\s+",
    re.IGNORECASE,
)
# Lines that a paragraph of sentences never has: examples, tables, grammar, addresses.
CODE = re.compile(
    r">>>|^\s*(?:\.\.|[@$%|+=#:<]|\w+ ?=|from [\w.]+ import\b|import [\w.]+$|def \w+\()|\w {3,}\S"
    r"|::=|[-=_*~^]{4,}|https?://|XXX|TODO|\\|[\w.-]+@[\w-]+\.|Copyright|Traceback",
    re.MULTILINE,
)
# A parameter, an option or a signature: it opens a list entry, but a sentence may wrap onto one.
FIELD = re.compile(r"^\s*(?:[\w.,]+(?: [\w.,]+)?\s*(?:--?|:|[-=]>)\s|[\w.]+\(.*\)\s*(?:-|:|$))")


@dataclass(frozen=True)
class Recipe:
    """The shape of the model and how it is trained."""

    layers: int = 4
    hidden: int = 192
    heads: int = 6
    vocabulary: int = 4096
    dropout: float = 0.1
    epochs: int = 12
    patience: int = 6
    batch: int = 4
    lr: float = 2e-3
    decay: float = 0.1
    seed: int = 0


def source_texts(root: Path) -> Iterator[str]:
    """Docstrings and comment blocks of the library under `root`, read without importing it."""
    for path in sorted(root.rglob("*.py")):
        if SKIPPED.intersection(path.relative_to(root).parts):
            continue
        source = path.read_bytes()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.get_docstring(node) or ""
        for block in COMMENTS.findall(source.decode("utf-8", "replace")):
            yield re.sub(r"(?m)^[ \t]*#+ ?", "", block)


def builtin_texts() -> Iterator[str]:
    """Docstrings of the modules compiled into the interpreter, which have no source to parse."""
    for name in sorted(sys.builtin_module_names):
        module = importlib.import_module(name)
        members = list(vars(module).values())
        owned = [each for kind in members if isinstance(kind, type) for each in vars(kind).values()]
        texts = (getattr(item, "__doc__", None) for item in [module, *members, *owned])
        yield from (text for text in texts if isinstance(text, str))


def topic_texts() -> Iterator[str]:
    """Sections of the language reference that `help()` shows."""
    for text in importlib.import_module("pydoc_data.topics").topics.values():
        yield from HEADING.split(text)


def clean(paragraph: str) -> str:
    """One paragraph as one line of plain English, or nothing if it is not prose."""
    text = LEAD.sub("", ROLE.sub(r"\1", paragraph.translate(TYPOGRAPHY)))
    text = NOTE.sub("", MARKED.sub(lambda found: found[found.lastindex or 0], text).strip())
    fields = [bool(FIELD.search(line)) for line in text.splitlines()]
    if any(fields[:1]) or sum(fields) > 1 or CODE.search(text):
        return ""
    text = " ".join(text.split()).rstrip(":,;")
    words, common = len(text.split()), len(COMMON.findall(text))
    plain = sum(char.isalnum() or char in PLAIN for char in text)
    english = plain >= 0.96 * len(text) and common >= max(1, 0.18 * words)
    # A short line that ends in a colon only announces the example that was left out.
    long_enough = words >= (8 if paragraph.rstrip().endswith(":") else 3)
    if not (english and long_enough and text.isascii() and text[0].isalpha()):
        return ""
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?)" else ".")


def documents(texts: Iterable[str]) -> Iterator[str]:
    """Cleaned texts; a paragraph seen before is left out, since the library repeats itself."""
    seen = {""}
    for text in texts:
        kept = []
        for line in map(clean, PARAGRAPH.split(text)):
            key = re.sub("[^a-z]", "", line.lower())
            if key not in seen:
                seen.add(key)
                kept.append(line)
        if kept:
            yield "\n\n".join(kept)


def extract_corpus() -> dict[str, Any]:
    """The whole corpus of the running interpreter, with the version that it came from."""
    texts = [*topic_texts(), *source_texts(Path(sysconfig.get_path("stdlib"))), *builtin_texts()]
    return {"python": sys.version.split()[0], "documents": list(documents(texts))}


def is_held_out(document: str) -> bool:
    """Decided by the document alone, so the split is the same in every run."""
    return hashlib.sha256(document.encode()).digest()[0] < 256 * HELD_OUT


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE like GPT-2's, so every string can be encoded, learned from `texts`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def token_rows(bpe: Tokenizer, texts: list[str]) -> list[torch.Tensor]:
    """Ids of each document, closed by the end token that separates it from the next."""
    return [torch.tensor([*row.ids, END_ID]) for row in bpe.encode_batch(texts)]


def crops_of(rows: list[torch.Tensor], rng: random.Random) -> torch.Tensor:
    """One pass in a new order, cut at a new offset, so that no two epochs show the same crops."""
    ids = torch.cat(rng.sample(rows, len(rows)))[rng.randrange(CONTEXT) :]
    return ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)


@torch.no_grad()
def held_out_nats(model: GPT2LMHeadModel, ids: torch.Tensor) -> float:
    """Mean loss over `ids`; windows share one token so that each token is predicted once."""
    model.train(mode=False)
    total = 0.0
    for start in range(0, len(ids) - 1, CONTEXT - 1):
        window = ids[start : start + CONTEXT].to(model.device)
        logits = model(window[None]).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return total / (len(ids) - 1)


def new_model(recipe: Recipe) -> GPT2LMHeadModel:
    """An untrained GPT-2 of the recipe's shape, on the GPU if there is one."""
    shape = {"n_layer": recipe.layers, "n_embd": recipe.hidden, "n_head": recipe.heads}
    ends = {"bos_token_id": END_ID, "eos_token_id": END_ID}
    # No dropout in attention: it rules out the fused kernels, which are most of the speed on a CPU.
    dropout = {"resid_pdrop": recipe.dropout, "embd_pdrop": recipe.dropout, "attn_pdrop": 0.0}
    sizes = {"vocab_size": recipe.vocabulary, "n_positions": CONTEXT}
    kernel = {"activation_function": "gelu_pytorch_tanh"}  # GPT-2's own, in one kernel, not six
    config = GPT2Config.from_dict(sizes | shape | ends | dropout | kernel)
    with torch.device(DEVICE):
        return GPT2LMHeadModel(config)


def train(
    model: GPT2LMHeadModel, rows: list[torch.Tensor], held_out: torch.Tensor, recipe: Recipe
) -> dict[str, torch.Tensor]:
    """Weights of the epoch with the lowest held-out loss; stops once that stays behind."""
    rng = random.Random(recipe.seed)  # noqa: S311 - an order to train in is no secret.
    steps = math.ceil(sum(map(len, rows)) / CONTEXT / recipe.batch) * recipe.epochs
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, steps, pct_start=0.05, cycle_momentum=False
    )
    best, best_epoch, kept = math.inf, 0, dict(model.state_dict())
    for epoch in range(1, recipe.epochs + 1):
        model.train(mode=True)
        for crops in torch.split(crops_of(rows, rng), recipe.batch):
            ids = crops.to(DEVICE)
            with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
                loss = model(ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        nats = held_out_nats(model, held_out)
        print(f"epoch {epoch}: last batch {loss.item():.3f}, held out {nats:.4f}", flush=True)
        if nats < best:
            best, best_epoch = nats, epoch
            kept = {name: value.clone() for name, value in model.state_dict().items()}
        elif epoch - best_epoch >= recipe.patience:
            break
    return kept


def build(corpus: dict[str, Any], output: Path, recipe: Recipe) -> dict[str, Any]:
    """Train on `corpus`, save the folder, and measure what was saved in float32."""
    started = time.monotonic()
    torch.manual_seed(recipe.seed)
    split: dict[bool, list[str]] = {True: [], False: []}
    for text in corpus["documents"]:
        split[is_held_out(text)].append(text)
    bpe = train_tokenizer(split[False], recipe.vocabulary)
    rows, held_out = token_rows(bpe, split[False]), torch.cat(token_rows(bpe, split[True]))
    model = new_model(recipe)
    model.load_state_dict(train(model, rows, held_out, recipe))
    output.mkdir(parents=True, exist_ok=True)
    torch.nn.Module.half(model)  # in place; the method of the class itself has no types
    model.save_pretrained(output)
    bpe.save(str(output / "tokenizer.json"))
    (output / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    saved = GPT2LMHeadModel.from_pretrained(output, dtype=torch.float32)
    nats = held_out_nats(saved, held_out)
    bits = nats * (len(held_out) - 1) / math.log(2) / sum(len(x.encode()) for x in split[True])
    summary = {
        "python": corpus["python"],
        "recipe": asdict(recipe),
        "parameters": saved.num_parameters(),
        "training_tokens": sum(map(len, rows)),
        "held_out_tokens": len(held_out),
        "held_out_nats_per_token": round(nats, 4),
        "held_out_perplexity": round(math.exp(nats), 2),
        "held_out_bits_per_byte": round(bits, 4),
        "device": DEVICE,
        "seconds": round(time.monotonic() - started),
    }
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    limits = {"model_max_length": CONTEXT, "clean_up_tokenization_spaces": False}
    for name, content in (("tokenizer_config", tokens | limits), ("training", summary)):
        (output / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return summary


def main() -> None:
    """Read or extract the corpus, then write it or train on it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--write-corpus", type=Path, metavar="FILE", help="only write the corpus")
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="train on a written corpus")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, metavar="FOLDER")
    for name, default in asdict(Recipe()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{default}")
    options = vars(parser.parse_args())
    target, source, output = (options.pop(name) for name in ("write_corpus", "corpus", "output"))
    corpus = json.loads(source.read_text("utf-8")) if source else extract_corpus()
    if target:
        target.write_text(json.dumps(corpus, indent=0), "utf-8")
    else:
        print(json.dumps(build(corpus, output, Recipe(**options)), indent=2))


if __name__ == "__main__":
    main()
