# Everything a newcomer needs: `make demo` and `make test` create the environment they need on their own.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
PY     := $(VENV)/bin/python
BENCH  := PYTHONPATH=tests $(PY)
export PATH := $(abspath $(VENV)/bin):$(PATH)

OUT    ?= demo
CLIPS  ?=
METHOD ?= cinemo-tiny
JOBS   ?= 2

.PHONY: setup demo test test-slow test-release check format docs bench bench-gpu bench-network bench-precompute bench-scale simulate bench-train bench-serve chaos chaos-train soak clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -m tools.setup '$(VENV)'
	@touch $@

demo: setup
	$(PY) pipelines/demo.py --recipe '$(METHOD)' --output '$(OUT)' $(if $(CLIPS),--clips '$(CLIPS)')

test: setup
	$(PY) -m pytest --numprocesses $(JOBS) --dist worksteal -m 'not slow' $(ARGS)

# What runs, kills and measures whole jobs and servers; a file with Ray stays in one process.
test-slow: setup
	$(PY) -m pytest --numprocesses $(JOBS) --dist loadgroup --no-loadscope-reorder -m 'slow and not release' --durations 40 $(ARGS)

# Slow tests that take minutes each and are not run with every change: before a release, or when you change what they test.
test-release: setup
	$(PY) -m pytest --numprocesses $(JOBS) --dist loadgroup --no-loadscope-reorder -m 'release and not own_process' $(ARGS) || [ $$? = 5 ]
	$(PY) -m pytest -m 'release and own_process' --durations 5 $(ARGS) || [ $$? = 5 ]

check: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(PY) -m pytest -q tests/test_layering.py

format: setup
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# The documentation as a site in build/site.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

bench: setup
	$(BENCH) benchmarks/bench.py

# On an accelerator, under nine minutes; ARGS='--device cpu --small' shows that it is whole.
bench-gpu: setup
	$(BENCH) benchmarks/bench_gpu.py $(ARGS)

bench-network: setup
	$(BENCH) benchmarks/bench_network.py

bench-precompute: setup
	$(BENCH) benchmarks/bench_precompute.py
	$(BENCH) benchmarks/bench_precompute_graph.py --write

bench-scale: setup
	$(BENCH) benchmarks/bench_scale.py

# Precompute on up to a thousand simulated nodes; ARGS=--calibrate holds it against real runs first.
simulate: setup
	$(BENCH) benchmarks/simulate_precompute.py $(ARGS)

bench-train: setup
	$(BENCH) benchmarks/bench_train.py

bench-serve: setup
	$(BENCH) benchmarks/bench_serve.py --write

chaos: setup
	$(BENCH) benchmarks/chaos.py $(ARGS)

chaos-train: setup
	$(BENCH) benchmarks/chaos_train.py $(ARGS)

soak: setup
	$(BENCH) benchmarks/soak.py $(ARGS)

clean:
	rm -rf $(VENV) demo build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
