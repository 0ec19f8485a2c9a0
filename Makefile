# Everything from a fresh machine with Python and make: `make demo`, `make test`, `make watch`.
#
# PYTHON=python3.12     another interpreter (3.11 to 3.13)
# TORCH_INDEX=URL       another package index for torch alone, such as PyTorch's own for CPU builds
# TORCH=torch==2.11.0   another torch

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
VENV ?= .venv

BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check

DEMO_OUTPUT := demo-output/completions.jsonl

# What comes with the chosen build of torch is not locked: CPU and CUDA builds differ in it.
NOT_LOCKED := torch triton cuda-bindings cuda-pathfinder cuda-toolkit $(addprefix nvidia-,cublas \
	cuda-cupti cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse \
	cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx)

.PHONY: demo test setup check unit lock readme dashboards watch clean

demo: $(READY)
	@mkdir -p $(dir $(DEMO_OUTPUT))
	@$(BIN)/shoal bulk ops/demo/prompts.txt -o $(DEMO_OUTPUT) --model demo --overwrite \
		--max-tokens 48 --temperature 0.8 --top-k 50

test: check unit

setup: $(READY)

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(READY)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

$(READY): ops/requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14), \
		"Shoal needs Python 3.11 to 3.13; choose one with make PYTHON=..."'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --require-hashes -r ops/requirements.lock
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# Needs uv. Resolves for every platform and Python at once.
lock:
	uv pip compile pyproject.toml --extra worker --extra exporter --extra bench --extra dev --universal --python-version 3.11 \
		--generate-hashes --no-annotate --no-strip-extras --custom-compile-command 'make lock' \
		--upgrade-package 'torch==2.13.0' \
		$(addprefix --no-emit-package ,$(NOT_LOCKED)) --quiet --output-file ops/requirements.lock

readme: $(READY)
	$(BIN)/python ops/readme_tables.py
	$(BIN)/python -m ops.metric_tables

dashboards: $(READY)
	$(BIN)/python -m ops.grafana.generate
	$(BIN)/python -m ops.vllm_names

# Redis, a worker, the exporter, Prometheus where it is installed, and a load, until Ctrl-C.
watch: $(READY)
	@$(BIN)/python -m ops.watch

clean:
	rm -rf $(VENV) demo-output .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache
