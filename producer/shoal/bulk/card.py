"""The card of a folder of shards: what the data set is and how it was made.

Its front matter says to data-set loaders where the rows are.
"""

from __future__ import annotations

import json
from pathlib import Path

from shoal.bulk.manifest import Manifest
from shoal.bulk.output import replace_durably

_CARD = """\
---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
tags:
- synthetic
- text-generation
---

# {name}

{rows} completions, generated with Shoal {version}.

| | |
| --- | --- |
| model | {model} |
| fingerprint | {fingerprint} |
| input | {input}, {input_rows} rows, sha256 `{input_sha256}` |
| failed rows | {failed} |
| seed | {seed} |
| sampling | `{sampling}` |
| sha256 of the rows | `{rows_sha256}` |

A row is a completion: `index` is its place in the input, `sample` its number among the completions
of one prompt. Row i's seed follows from the run's seed and i, so the same model on the same kind of
machine makes the same text again (`shoal verify`).
"""


def write_card(output: Path, manifest: Manifest, num_rows: int) -> None:
    """Write `README.md` into a folder of shards."""
    sampling = manifest.parameters.sampling
    text = _CARD.format(
        name=output.resolve().name,
        rows=f"{num_rows:,}",
        version=manifest.shoal,
        model=manifest.model or "–",
        fingerprint=manifest.fingerprint or "–",
        input=Path(manifest.input.path).name,
        input_rows=f"{manifest.input.rows:,}",
        input_sha256=manifest.input.sha256,
        failed=f"{manifest.rows_failed:,}",
        seed=manifest.parameters.seed,
        sampling=json.dumps(sampling),
        rows_sha256=manifest.rows_sha256 or "–",
    )
    beside = output / ".README.md.new"
    beside.write_text(text)
    replace_durably(beside, output / "README.md")
