"""A decode step that torch.compile has fused, on the CPU."""

from __future__ import annotations

import pytest
from tests.engine.serving import loaded_model, sequences, serve
from tests.engine.test_engine import generated_alone
from tests.tiny_models import tiny_config, tiny_model

from shoal_worker.bench.ablate.launches import num_compiled
from shoal_worker.engine import Engine
from shoal_worker.engine.options import EngineOptions
from shoal_worker.lanes import LaneSpec, LaneTable

TABLE = LaneTable([LaneSpec("bulk", 3, 64)])


# torch's compiler warns of torch's own use of what it deprecates.
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_gives_generate_s_greedy_tokens() -> None:
    num_before = num_compiled()
    served = sequences(lengths=(1, 17, 33, 50))

    serve(Engine(loaded_model("gpt2"), TABLE, EngineOptions(compile=True)), served)

    assert num_compiled() > num_before

    model = tiny_model(tiny_config("gpt2"))
    for one in served:
        assert one.output_token_ids == generated_alone(model, one)
