"""Settings: what is taken, what is refused, and how it reads."""

from __future__ import annotations

from typing import Any

import pytest
from click.testing import CliRunner

from shoal.errors import InvalidRequest, ModelError
from shoal_worker.cli import worker
from shoal_worker.engine_process import lane_table
from shoal_worker.settings import (
    EngineSettings,
    WorkerSettings,
    flag,
    read_engine_settings,
    read_settings,
    settings_table,
    variable,
)


def test_what_was_not_given_keeps_its_default() -> None:
    settings = read_settings({"model": "demo", "lease_s": None, "queues": "a, b"})

    assert (settings.lease_s, settings.queues) == (30.0, ("a", "b"))
    assert settings.engine == EngineSettings(model="demo")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"lease_s": 0.5}, "--lease is 0.5: .*greater than or equal to 1"),
        ({"metrics_port": 70000}, "--metrics-port is 70000: .*65535"),
        ({"device": "tpu"}, "--device is 'tpu'"),
        ({"queues": "a,b,a"}, "--queues: names a twice"),
        ({"queues": ","}, "--queues"),
        ({"threads": 0}, "--threads is 0"),
    ],
)
def test_a_bad_value_is_refused_by_its_flag(values: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        read_settings({"model": "demo", **values})


def test_the_engine_s_own_settings_are_read_alone() -> None:
    assert read_engine_settings({"model": "demo", "threads": 2}).threads == 2
    with pytest.raises(InvalidRequest, match="unknown field 'quues'"):
        read_engine_settings({"model": "demo", "quues": 1})


def test_every_setting_has_a_flag_a_variable_and_a_description() -> None:
    options = {option for param in worker.params for option in param.opts}
    table = settings_table()
    for name, info in WorkerSettings.model_fields.items():
        assert info.description, name
        assert flag(name) in options
        assert f"`{variable(name)}`" in table


def test_no_model_names_the_bundled_one() -> None:
    outcome = CliRunner().invoke(worker, [], env={"SHOAL_MODEL": ""})

    assert outcome.exit_code == 2
    assert "--model demo" in outcome.output


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"max_model_len": 600}, "--max-model-len is 600; the model takes 512"),
        ({"lanes": "fast=8x64"}, "--lanes: lane 'fast=8x64'"),
        ({"lanes": "bulk=8x1024"}, "2 to 512 positions"),
        ({"lanes": "bulk=0x64"}, "at least 1 slot"),
    ],
)
def test_lanes_that_do_not_fit_the_model_are_refused(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        lane_table(
            EngineSettings(model="demo", **values),
            max_positions=512,
            bytes_per_token=1,
        )


def test_the_default_table_follows_from_the_model_and_a_limit() -> None:
    table = lane_table(EngineSettings(model="demo", max_model_len=128), 512, 1)

    assert {lane.kv_len for lane in table.lanes} == {128}
    assert table.max_positions("bulk") == table.max_positions("interactive") == 128
