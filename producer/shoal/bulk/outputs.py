"""What a run has written, read back: each record's requests with the rows that answer them.

Owns where the requests come from: from the input, if it is there as it was, since a row may have
had sampling fields of its own; else from the output alone. Only reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from shoal.bulk.fields import Fields
from shoal.bulk.flat import FlatRow
from shoal.bulk.folder import RunFolder
from shoal.bulk.manifest import Manifest, load
from shoal.bulk.opening import line_format_of, output_of
from shoal.bulk.output import Output
from shoal.bulk.plan import OnLongRow, Plan
from shoal.bulk.readers import Survey, read_rows, survey
from shoal.bulk.resume import written_records
from shoal.bulk.rows import InputRow, Place
from shoal.errors import InvalidRequest
from shoal.validation import parse
from shoal.wire import GenerationRequest, SamplingParams


@dataclass(frozen=True, slots=True)
class WrittenRecord:
    """A record of the input: its prompts as requests, and the flat rows that they were answered."""

    rows: list[InputRow]
    flats: list[FlatRow]


@dataclass(frozen=True, slots=True)
class WrittenRun:
    """A run as its output and manifest tell it.

    Attributes:
        found: what the input is, if it is there and the same as it was.
    """

    plan: Plan
    manifest: Manifest
    found: Survey | None

    def records(self) -> Iterator[WrittenRecord]:
        """Every record that was answered with rows, in order.

        Raises:
            InvalidRequest: without the input, the output says too little.
        """
        return self._with_input(self.found) if self.found else self._alone()

    def is_as_written(self) -> bool:
        """Whether the file or files are those that the complete run left behind."""
        expected = self.manifest.file_sha256
        return expected is None or self.output().sha256() == expected

    def _with_input(self, found: Survey) -> Iterator[WrittenRecord]:
        plan = self.plan
        rows = read_rows(plan.source, plan.row_defaults(found.kinds), plan.limit)
        output = output_of(plan, found)
        for prompts, lines in written_records(rows, output, line_format_of(plan)):
            yield WrittenRecord(prompts, [json.loads(line) for line in lines.canonical])

    def _alone(self) -> Iterator[WrittenRecord]:
        if self.manifest.parameters.input_format == "openai-batch":
            raise InvalidRequest(
                f"{self.manifest.input.path} is not there as it was, and {self.plan.output} does "
                "not tell what its lines asked for"
            )
        for _index, flats in groupby(output_rows(self), key=lambda flat: flat["index"]):
            yield self._record(list(flats))

    def _record(self, flats: list[FlatRow]) -> WrittenRecord:
        first = flats[0]
        sampling = {**self.plan.sampling, "n": len(flats), "seed": first["seed"]}
        request = parse(
            GenerationRequest,
            {
                "prompt": first["prompt"],
                "id": first["id"],
                "sampling": parse(SamplingParams, sampling),
                "service_class": "bulk",
            },
        )
        place = Place(first["index"], first["index"] + 1)
        metadata = json.loads(first["metadata"])
        return WrittenRecord([InputRow(place, first["id"], request, first, metadata)], flats)

    def output(self) -> Output:
        """The output, to be read."""
        return output_of(self.plan, self.found or Survey("", 0, {}))  # Types matter to writers.


def written_run(output: Path) -> WrittenRun:
    """The run that has written this output.

    Raises:
        InvalidRequest: there is no such output, or no run has written it.
    """
    if not output.exists():
        raise InvalidRequest(f"there is no {output}")
    manifest = load(RunFolder(output).manifest)
    if manifest is None:
        raise InvalidRequest(
            f"no bulk run wrote {output}: {RunFolder(output).manifest} is missing, which says how "
            "its rows were made"
        )
    plan = _plan(manifest, output)
    return WrittenRun(plan, manifest, _same_input(plan, manifest))


def output_rows(run: WrittenRun) -> Iterator[FlatRow]:
    """The flat rows of the output, in order, whatever its format."""
    for line in run.output().stored():
        yield json.loads(line)


def _plan(manifest: Manifest, output: Path) -> Plan:
    """What the run was asked for, as far as it can change a row."""
    given = manifest.parameters
    sampling: Mapping[str, Any] = given.sampling
    return Plan(
        source=Path(manifest.input.path),
        output=output,
        sampling=sampling,
        seed=given.seed,
        limit=given.limit,
        model=given.model,
        fields=Fields(
            given.prompt_column, given.template, given.id_column, tuple(given.keep_columns)
        ),
        on_long=cast("OnLongRow", given.on_long),
        ignore_model=given.ignore_model,
        return_token_ids=given.return_token_ids,
        rows_per_shard=given.rows_per_shard,
    )


def _same_input(plan: Plan, manifest: Manifest) -> Survey | None:
    try:
        found = survey(plan.source, plan.fields)
    except (OSError, InvalidRequest):
        return None
    return found if found.sha256 == manifest.input.sha256 else None
