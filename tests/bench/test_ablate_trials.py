"""Every switch's two arms on a tiny model: they differ countably, and keep what they promise."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from tests.engine.serving import TABLE, ahead, loaded_model, sequences, serve
from tests.tiny_models import MAX_POSITIONS, VOCAB_SIZE, make_tiny_model_folder, tiny_tokenizer

from shoal.errors import ModelError
from shoal_worker.bench.ablate.answers import Counts, difference
from shoal_worker.bench.ablate.arms import DEFAULT, Arm
from shoal_worker.bench.ablate.launches import launched_by, unread_counted
from shoal_worker.bench.ablate.load import LOADS
from shoal_worker.bench.ablate.python_bpe import PythonBPE
from shoal_worker.bench.ablate.rungs import NAIVE, rungs
from shoal_worker.bench.ablate.slower_top_k import by_mask, by_scatter
from shoal_worker.bench.ablate.switch import Switch
from shoal_worker.bench.ablate.switches import switches
from shoal_worker.bench.ablate.tokenising import TokenisingTrial
from shoal_worker.bench.ablate.trial import ServingTrial
from shoal_worker.engine import Engine, native
from shoal_worker.engine.model import dtype_on

LOAD = replace(
    LOADS["cpu", True],
    slots=2,
    num_prompts=3,
    new_tokens=(2, 5),
    mean_new_tokens=3,
    num_texts=20,
    lone_prompts=2,
)
ALL = switches(str(dtype_on(torch.device("cpu"), "auto")).removeprefix("torch."))
# Compiling takes as long as all the others together.
SERVED = [s for s in ALL if s.kind == "serving" and s.only_on != "cuda" and s.name != "compile"]
OTHER_DRAWS = ("scatter", "mask")
ROUNDED = ("dtype", "int8-kv", "matmul-high", "matmul-medium")


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Arm], tuple[Counts, list[object]]]:
    """What an arm counts and what it generates, once for each."""
    folder = make_tiny_model_folder(tmp_path_factory.mktemp("models") / "tiny")

    @cache
    def of(arm: Arm) -> tuple[Counts, list[object]]:
        with ExitStack() as stack:
            made = ServingTrial(str(folder), "cpu", arm, LOAD, stack, warm_up=False)
            return made.counts(), list(made.run().completions)

    return of


def skip_without_native_code() -> None:
    try:
        native.library()
    except native.NativeUnavailable as error:
        assert "CI" not in os.environ, "CI has a compiler"
        pytest.skip(str(error))


Trial = Callable[[Arm], tuple[Counts, list[object]]]


@pytest.mark.parametrize("switch", SERVED, ids=lambda switch: switch.name)
def test_a_switch_s_arms_differ_in_something_countable(trial: Trial, switch: Switch) -> None:
    if switch.name == "kernels":
        skip_without_native_code()

    found = difference(trial(switch.on)[0], trial(switch.off)[0])

    assert (found is None) == (switch.name == "control")


def test_launches_ahead_of_a_read_are_counted() -> None:
    with unread_counted() as at_once:
        serve(Engine(loaded_model(), TABLE), sequences())
    with unread_counted() as ahead_of_reads:
        serve(ahead(Engine(loaded_model(), TABLE), decode_steps=2), sequences())

    assert set(at_once) == {1}
    assert max(ahead_of_reads) > 1


def test_an_arm_counts_alike_twice(trial: Trial, tmp_path: Path) -> None:
    folder = make_tiny_model_folder(tmp_path / "tiny")
    with ExitStack() as stack:
        again = ServingTrial(str(folder), "cpu", DEFAULT, LOAD, stack, warm_up=False).counts()

    assert difference(trial(DEFAULT)[0], again) is None


@pytest.mark.parametrize(
    "switch",
    [s for s in SERVED if s.off.top_k not in OTHER_DRAWS and s.name not in ROUNDED],
    ids=lambda switch: switch.name,
)
def test_ways_that_only_cost_time_make_the_same_tokens(trial: Trial, switch: Switch) -> None:
    assert trial(switch.on)[1] == trial(switch.off)[1]


def test_the_naive_loop_makes_the_default_s_first_completions(trial: Trial) -> None:
    naive = trial(NAIVE)[1]

    assert naive == trial(DEFAULT)[1][: len(naive)]
    assert len(naive) == LOAD.lone_prompts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_each_rung_is_another_arm_and_the_last_is_the_default(on_gpu: bool, dtype: str) -> None:
    arms = [rung.arm for rung in rungs(on_gpu=on_gpu, default_dtype=dtype)]

    assert len(set(arms)) == len(arms)
    assert arms[-1] == DEFAULT


def test_a_closed_trial_leaves_torch_as_it_was(trial: Trial) -> None:
    trial(DEFAULT.with_settings(matmul_precision="medium"))
    trial(DEFAULT.with_settings(cudnn_benchmark=False))

    assert torch.get_float32_matmul_precision() == "highest"


def test_a_model_too_short_for_the_load_is_refused() -> None:
    with pytest.raises(ModelError, match=r"takes 20 positions and the benchmark's longest.* 37"):
        LOAD.table(DEFAULT, 20)


def test_without_grouping_there_is_one_lane_and_one_bucket() -> None:
    (lane,) = LOAD.table(replace(DEFAULT, grouping=False), MAX_POSITIONS).lanes

    assert (lane.kv_len, [bucket.length for bucket in lane.buckets()]) == (MAX_POSITIONS, [32])


@pytest.mark.parametrize(
    ("by_length", "fine", "expected"),
    [
        *((None, True, [64, MAX_POSITIONS]), (None, False, [MAX_POSITIONS])),
        *((True, False, [64, MAX_POSITIONS]), (False, True, [MAX_POSITIONS])),
    ],
)
def test_lanes_come_by_length_on_a_cpu_and_where_an_arm_says_so(
    by_length: bool | None, fine: bool, expected: list[int]
) -> None:
    arm = replace(DEFAULT, lanes_by_length=by_length)

    assert [lane.kv_len for lane in LOAD.table(arm, MAX_POSITIONS, fine=fine).lanes] == expected


def test_scatter_keeps_k_tokens_and_the_mask_keeps_ties_too() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0], [4.0, 1.0, 3.0, 2.0]])

    kept = [(way(logits, 2) > -torch.inf).sum(dim=1).tolist() for way in (by_scatter, by_mask)]

    assert kept == [[2, 2], [3, 2]]


def test_launches_are_told_apart_by_dtype_and_shape() -> None:
    counts = launched_by(lambda: torch.ones(2) + torch.ones(2))

    assert counts["aten.add.Tensor float32[2] float32[2]"] == 1


def test_python_s_bpe_gives_the_fast_tokenizer_s_tokens() -> None:
    tokenizer = tiny_tokenizer()
    python = PythonBPE(tokenizer)

    for text in [*LOAD.texts(), "Grüße, 你好: 12 fish's  \n\n end"]:
        assert python(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = None

    with pytest.raises(ModelError, match="no byte-level BPE"):
        PythonBPE(tokenizer)


@pytest.mark.parametrize("switch", [s for s in ALL if s.kind == "tokenising"], ids=lambda s: s.name)
def test_ways_of_tokenising_differ_in_calls_alone(switch: Switch) -> None:
    tokenizer = tiny_tokenizer()
    on, off = (
        TokenisingTrial(tokenizer, LOAD.texts(), arm.tokenising) for arm in (switch.on, switch.off)
    )

    assert difference(on.counts(), off.counts()) is not None
    assert on.run().completions == off.run().completions


def test_old_loading_gives_the_same_weights_by_initialising_first(tmp_path: Path) -> None:
    folder = make_tiny_model_folder(tmp_path / "tiny")
    logits, counts = [], []
    for arm in (DEFAULT, replace(DEFAULT, loading="state_dict")):
        with ExitStack() as stack:
            made = ServingTrial(str(folder), "cpu", arm, LOAD, stack, warm_up=False)
            logits.append(made.logits()[1])
            counts.append(made.load_counts())

    assert (logits[0] == logits[1]).all()
    assert logits[0].shape == (2, VOCAB_SIZE)
    assert difference(counts[0], counts[1]) is not None
