"""The arithmetic of the ledger, what it says of it, and where its settings are documented."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from shoal.errors import InvalidRequest
from shoal_worker.bench.ablate.answers import Counts, difference
from shoal_worker.bench.ablate.arms import DEFAULT
from shoal_worker.bench.ablate.cells import cells_of, rung_cells
from shoal_worker.bench.ablate.claims import as_gain, claim_rows
from shoal_worker.bench.ablate.command import ablate
from shoal_worker.bench.ablate.ledger import (
    Header,
    Ledger,
    Output,
    Reading,
    Row,
    RungRow,
    read_ledger,
)
from shoal_worker.bench.ablate.markdown import as_markdown
from shoal_worker.bench.ablate.ratios import Interval, paired_ratio, steps, verdict
from shoal_worker.bench.ablate.switch import Claim
from shoal_worker.bench.ablate.switches import switches
from shoal_worker.settings import EngineSettings, WorkerSettings, flag

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
LEDGERS = Path(__file__).parents[2] / "worker/shoal_worker/bench/ledger"
# Settings that say what is served and where, not how fast.
NO_SWITCH = {"model", "served_model_name", "device", "max_model_len", "threads", "warm_up"}


def reading(on: float, off: float, spread: float = 0.0) -> Reading:
    ratio = on / off
    return Reading(
        on=on,
        off=off,
        ratio=ratio,
        low=ratio * (1 - spread),
        high=ratio * (1 + spread),
        values=[(on, off)] * 6,
    )


def row(name: str = "kv-cache", **changes: Any) -> Row:
    fields: dict[str, Any] = {
        "name": name,
        "title": "KV cache",
        "kind": "serving",
        "on_text": "kept",
        "off_text": "read again",
        "setting": None,
        "default": "on",
        "readings": {
            "tokens_per_s": reading(300, 60, 0.1),
            "ttft_s": reading(0.5, 1.0, 0.1),
            "peak_rss_bytes": reading(9 * 2**20, 10 * 2**20),
        },
        "output": Output(equal=8, compared=8, max_logit_difference=0.0),
        "evidence": "operators launched: 1 and 2",
        "claims": [],
    }
    return Row(**(fields | changes))


def ledger(*rows: Row, **changes: Any) -> Ledger:
    header = {
        "hardware": "a CPU",
        "device": "cpu",
        "threads": 2,
        "model": "tiny",
        "dtype": "float32",
        "versions": {"torch": "2", "transformers": "5"},
        "load": "8 prompts",
        "quick": True,
    }
    rungs = [
        RungRow(title=title, tokens_per_s=speed, of_default=share, low=share, high=share, pairs=3)
        for title, speed, share in (("naive", 10.0, 0.1), ("cache", 50.0, 0.5), ("all", 100.0, 1.0))
    ]
    return Ledger(
        header=Header(**(header | changes)),
        commands=["then: shoal bench ablate"],
        rows=list(rows),
        waterfall=rungs,
        not_here={"CUDA graphs": "it needs a GPU"},
    )


def test_a_ratio_is_the_median_over_pairs_and_drift_cancels() -> None:
    offs = [100.0, 50.0, 25.0, 80.0, 40.0, 60.0]

    ratio = paired_ratio([1.2 * off for off in offs], offs)

    assert ratio == pytest.approx(Interval(1.2, 1.2, 1.2))


def test_the_interval_holds_the_true_ratio_about_as_often_as_it_says() -> None:
    draw = random.Random(3)
    held = 0
    for number in range(60):
        offs = [draw.gauss(100, 5) for _ in range(10)]
        ons = [draw.gauss(110, 5) for _ in range(10)]
        interval = paired_ratio(ons, offs, seed=number)
        assert interval.low <= interval.ratio <= interval.high
        held += interval.low <= 1.1 <= interval.high

    assert held >= 50


def test_equal_numbers_have_equal_bounds() -> None:
    ons, offs = [3.0, 4.0, 5.0], [2.0, 2.5, 4.0]

    assert paired_ratio(ons, offs) == paired_ratio(ons, offs)


def test_no_difference_is_null() -> None:
    draw = random.Random(5)
    ons, offs = ([draw.gauss(100, 3) for _ in range(12)] for _ in range(2))

    assert paired_ratio(ons, offs).is_null


def test_an_inverted_interval_is_of_the_inverse() -> None:
    assert Interval(2.0, 1.6, 4.0).inverted() == Interval(0.5, 0.25, 0.625)


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (Interval(1.01, 0.99, 1.03), "no effect"),
        (Interval(0.9, 0.85, 0.95), "opposite"),
        (Interval(1.03, 1.01, 1.04), "less than claimed"),
        (Interval(1.07, 1.04, 1.12), "as claimed"),
        (Interval(1.3, 1.2, 1.4), "more than claimed"),
    ],
)
def test_a_claim_is_judged_by_the_interval(measured: Interval, expected: str) -> None:
    assert verdict(measured, 1.05, 1.10) == expected


def test_a_waterfall_s_steps_multiply_to_its_whole() -> None:
    factors = steps([2.0, 3.0, 12.0, 6.0])

    assert factors == [1.0, 1.5, 4.0, 0.5]
    assert rung_cells(ledger().waterfall)[1] == ("cache", "50.0", "5.00", "50.0% [50.0%, 50.0%]")


def test_a_time_and_a_size_gain_by_being_less() -> None:
    assert reading(0.5, 1.0).gain("ttft_s").ratio == 2
    assert reading(0.5, 1.0).gain("tokens_per_s").ratio == 0.5


@pytest.mark.parametrize(
    ("gain", "text"),
    [
        (Interval(1.12, 1.09, 1.14), "+12.0% [+9.0%, +14.0%]"),
        (Interval(0.97, 0.96, 0.98), "-3.0% [-4.0%, -2.0%]"),
        (Interval(5.2, 5.0, 5.4), "5.20× [5.00, 5.40]"),
    ],
)
def test_gains_read_as_people_say_them(gain: Interval, text: str) -> None:
    assert as_gain(gain) == text


def test_claims_about_memory_take_what_the_device_has_and_leave_room_for_noise() -> None:
    claim = Claim("10–15% less memory", "peak_bytes", 1 / 0.9, 1 / 0.85)
    on_cpu = {"peak_rss_bytes": reading(88, 100)}
    on_gpu = {"gpu_peak_bytes": reading(99.8, 100), **on_cpu}

    (cpu,), (gpu,) = (claim_rows([claim], readings, {}) for readings in (on_cpu, on_gpu))

    assert (cpu.measured, cpu.verdict) == ("12% less peak RSS", "as claimed")
    assert gpu.verdict == "no effect"


def test_a_claim_about_a_fact_is_compared_with_the_fact() -> None:
    claim = Claim("about 73 KB a token", "kv_bytes_per_token", 72e3, 74e3)

    (found,) = claim_rows([claim], {}, {"kv_bytes_per_token": "73728"})

    assert (found.measured, found.verdict) == ("73.7 KB", "as claimed")


def test_arms_that_count_alike_are_called_so() -> None:
    counts = Counts({"add [2]": 3}, {"precision": "high"})

    assert difference(counts, counts) is None
    assert difference(counts, Counts({"add [3]": 3}, {"precision": "high"})) is not None
    assert difference(counts, Counts({"add [2]": 3}, {"precision": "low"})) is not None
    ahead = replace(counts, most_unread=3)
    assert difference(ahead, counts) == "calls launched before one is read: 3 and 0"
    assert cells_of(row(evidence=""), ledger()).verdict == "faster, nothing differs"


def test_a_null_is_reported_as_a_null() -> None:
    null = row(readings={"tokens_per_s": reading(101, 100, 0.02)})

    assert cells_of(null, ledger()).verdict == "no effect"


def test_what_is_no_larger_than_the_control_s_difference_is_its_noise() -> None:
    control = row("control", readings={"tokens_per_s": reading(100, 100, 0.04)})
    small = row("small", readings={"tokens_per_s": reading(103, 100, 0.01)})
    large = row("large", readings={"tokens_per_s": reading(108, 100, 0.01)})
    loading = row("loading", kind="loading", readings={"load_s": reading(97, 100, 0.01)})
    measured = ledger(control, small, large, loading)

    assert [cells_of(one, measured).verdict for one in measured.rows] == [
        *("no effect", "within the control's noise", "faster", "faster")
    ]


def test_a_row_is_readable() -> None:
    cells = cells_of(row(), ledger())

    assert cells.amounts == "300 / 60.0 tok/s"
    assert cells.gain == "5.00× [4.50, 5.50], 6"
    assert (cells.later, cells.memory) == ("+100%", "9 / 10 MiB (-10%)")
    assert cells.output == "same tokens, same logits"


def test_rows_are_put_into_a_ledger_in_order() -> None:
    order = ["control", "kv-cache"]
    old = ledger(row("kv-cache"))
    new = ledger(row("kv-cache", title="again"), row("control"))

    both = old.with_rows(new, order)

    assert [(r.name, r.title) for r in both.rows] == [
        ("control", "KV cache"),
        ("kv-cache", "again"),
    ]
    assert both.commands == ["then: shoal bench ablate"]


def test_another_machine_s_rows_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="ledger's hardware is 'a CPU' and this run's is 'b'"):
        ledger().with_rows(ledger(hardware="b"), [])


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")

    with pytest.raises(InvalidRequest, match="is no ledger of shoal bench ablate: header"):
        read_ledger(path)


def test_a_ledger_is_shown_without_measuring(tmp_path: Path) -> None:
    path, markdown, picture = (tmp_path / name for name in ("l.json", "l.md", "l.png"))
    path.write_text(ledger(row()).model_dump_json())
    outputs = ["--markdown", str(markdown), "--picture", str(picture)]

    shown = CliRunner().invoke(ablate, ["--show", "--ledger", str(path), *outputs])

    assert shown.exit_code == 0, shown.output
    assert "5.00× [4.50, 5.50]" in shown.output
    assert "CUDA graphs (it needs a GPU)" in shown.output
    assert "![Ratios and waterfall](l.png)" in markdown.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert read_ledger(path) == ledger(row())


def test_a_name_that_is_no_switch_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="--only 'kv-cache,speed': speed is none of control"):
        CliRunner().invoke(ablate, ["--only", "kv-cache,speed"], catch_exceptions=False)


def test_showing_needs_a_ledger() -> None:
    shown = CliRunner().invoke(ablate, ["--show"])

    assert shown.exit_code == 2
    assert "--show needs the --ledger" in shown.output


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_switch_has_a_name_of_its_own_and_two_arms(dtype: str) -> None:
    all_switches = switches(dtype)

    assert len({switch.name for switch in all_switches}) == len(all_switches)
    for switch in all_switches:
        assert (switch.on == switch.off) == (switch.name == "control")
        assert switch.default is not None or DEFAULT not in (switch.on, switch.off)


def test_every_setting_that_is_compared_is_documented_in_one_table() -> None:
    (table,) = README.split("<!-- settings:")[1].split("<!-- /settings -->")[:1]
    settings = {switch.setting for switch in switches("float32")} - {None}

    assert settings <= WorkerSettings.model_fields.keys()
    for setting in settings:
        assert f"| `{flag(str(setting))}` |" in table


def test_every_setting_of_the_engine_is_compared_or_is_no_matter_of_speed() -> None:
    compared = {switch.setting for switch in switches("float32")}
    missing = EngineSettings.model_fields.keys() - compared - NO_SWITCH

    assert not missing, f"add a switch to bench/ablate/switches.py for {', '.join(missing)}"


def test_the_ledgers_that_are_listed_are_there_and_shown_as_they_are() -> None:
    names = {switch.name for switch in switches("float32")}
    listed = re.findall(r"^\| \[(\S+)\]", (LEDGERS / "README.md").read_text("utf-8"), re.MULTILINE)

    assert sorted(path.stem for path in LEDGERS.glob("*.json")) == sorted(listed)
    for name in listed:
        committed = read_ledger(LEDGERS / f"{name}.json")
        assert {row.name for row in committed.rows} <= names
        shown = (LEDGERS / f"{name}.md").read_text(encoding="utf-8")
        assert shown == as_markdown(committed, f"{name}.png")
        assert (LEDGERS / f"{name}.png").exists()
