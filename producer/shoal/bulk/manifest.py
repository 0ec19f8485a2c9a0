"""What a run is and how far it has come, as one JSON file that is replaced in one step.

Owns what binds a run: an input's digest and the parameters that can change a row. A second run of
other input or other parameters is refused with the difference named.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from shoal.bulk.folder import RunFolder
from shoal.bulk.job_names import new_run_id
from shoal.bulk.output import Output, replace_durably, size_of
from shoal.bulk.shards import ROWS_PER_SHARD
from shoal.errors import InvalidRequest

MANIFEST_VERSION = 1


class InputFile(BaseModel):
    """The input: where it was, and what it was."""

    path: str
    sha256: str
    rows: int


class Parameters(BaseModel):
    """Everything but the input that can change a row."""

    input_format: str
    sampling: dict[str, Any]
    seed: int
    limit: int | None = None
    model: str | None = None
    template: str | None = None
    prompt_column: str | None = None
    id_column: str | None = None
    keep_columns: list[str] = Field(default_factory=list)
    on_long: str = "error"
    ignore_model: bool = False
    return_token_ids: bool = False
    rows_per_shard: int = ROWS_PER_SHARD


class Manifest(BaseModel):
    """A run's identity, progress and digests.

    Attributes:
        run_id: in the names of the run's jobs; kept when it goes on, new with `--overwrite`.
        rows_done: input rows of which the outcome is written, completions or error.
        rows_failed, rows_skipped: those of them in the error file; a skipped one has not failed.
        rows_sha256: over the canonical rows, so the same whatever the output's format.
        file_sha256: over the output file's bytes; for a folder, over what `sha256sum` says of its
            shards in order. None until the run is complete.
        fingerprint: of the first worker that answered.
    """

    version: int = MANIFEST_VERSION
    shoal: str = Field(default_factory=lambda: version("shoal"))
    run_id: str = Field(default_factory=new_run_id)
    input: InputFile
    parameters: Parameters
    fingerprint: str | None = None
    model: str | None = None
    rows_done: int = 0
    rows_failed: int = 0
    rows_skipped: int = 0
    completions: int = 0
    complete: bool = False
    output: str = ""
    output_bytes: int = 0
    rows_sha256: str | None = None
    file_sha256: str | None = None

    def save(self, path: Path) -> None:
        """Replace the file at `path`; after a crash it is the old one or the new one, whole."""
        beside = path.with_name(path.name + ".new")
        beside.write_text(self.model_dump_json(indent=2) + "\n")
        replace_durably(beside, path)

    def require_same(self, other: Manifest, output: Path) -> None:
        """Raises InvalidRequest that names the differences if `other` is another run."""
        found = list(self._differences(other))
        if found:
            raise InvalidRequest(
                f"{output} was begun with {' and '.join(found)}; give what it was begun with, "
                "another output, or --overwrite to start anew"
            )

    def is_other(self, other: Manifest) -> bool:
        """Whether `other` is another run than this."""
        return any(self._differences(other))

    def _differences(self, other: Manifest) -> Iterator[str]:
        if self.input.sha256 != other.input.sha256:
            yield f"another input ({self.input.path}, {self.input.rows} rows)"
        mine, theirs = _flat(self.parameters), _flat(other.parameters)
        for name in mine | theirs:
            before, now = mine.get(name), theirs.get(name)
            # Without a name a run takes whatever model is served, so there is nothing to compare.
            unnamed = name == "model" and None in {before, now}
            if before != now and not unnamed:
                yield f"{name} {json.dumps(before)} (now {json.dumps(now)})"


def load(path: Path) -> Manifest | None:
    """The manifest at `path`; None if there is none.

    Raises:
        InvalidRequest: it cannot be understood.
    """
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(_unreadable(path, str(error))) from None
    found = record.get("version") if isinstance(record, dict) else None
    if found != MANIFEST_VERSION:
        raise InvalidRequest(
            f"{path} is of manifest version {json.dumps(found)}; this Shoal reads version "
            f"{MANIFEST_VERSION}: go on with the Shoal that began it, or start anew with "
            "--overwrite"
        )
    try:
        return Manifest.model_validate(record)
    except ValidationError as error:
        field = ".".join(map(str, error.errors()[0]["loc"]))
        raise InvalidRequest(_unreadable(path, f"{field} is missing or wrong")) from None


def replaced_run(folder: RunFolder, manifest: Manifest, *, overwrite: bool) -> str | None:
    """The run that this one, which has no rows yet, takes the place of; None if there is none.

    One that was stopped before its first row was written is no other run, but goes on.
    """
    try:
        earlier = load(folder.manifest)
    except InvalidRequest:
        return None
    if earlier is None:
        return None
    if overwrite or earlier.is_other(manifest):
        return earlier.run_id
    manifest.run_id = earlier.run_id
    return None


def take_over(folder: RunFolder, manifest: Manifest, output: Output) -> bool:
    """Whether the files hold rows of an earlier run of the same; its findings are taken over.

    Raises:
        InvalidRequest: they are another run's, or no run's.
    """
    num_bytes = output.size()
    if not num_bytes and not size_of(folder.errors) and not _has_files(folder.output):
        return False
    earlier = load(folder.manifest)
    if earlier is None:
        raise InvalidRequest(
            f"{folder.output} exists and no bulk run wrote it; name another output, or give "
            "--overwrite to replace it"
        )
    earlier.require_same(manifest, folder.output)
    if earlier.complete and num_bytes > earlier.output_bytes:
        raise InvalidRequest(
            f"{folder.output} was complete with {earlier.output_bytes} bytes and has {num_bytes} "
            "now; name another output, or give --overwrite to replace it"
        )
    manifest.run_id = earlier.run_id
    manifest.fingerprint, manifest.model = earlier.fingerprint, earlier.model
    manifest.complete = earlier.complete
    if manifest.parameters.model is None:
        manifest.parameters.model = earlier.parameters.model
    return True


def _has_files(output: Path) -> bool:
    """Whether the output is a folder with anything in it, which may be somebody's."""
    return output.is_dir() and any(output.iterdir())


def _unreadable(path: Path, reason: str) -> str:
    return f"{path} is not readable as a manifest: {reason}; --overwrite starts anew"


def _flat(parameters: Parameters) -> dict[str, Any]:
    values = parameters.model_dump(mode="json")
    sampling: dict[str, Any] = values.pop("sampling")
    return {**sampling, **values}
