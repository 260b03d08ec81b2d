# Every target needs nothing before it: `install` is a dependency of all of them.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo dev test lint bench lock stop clean

install: .venv/.installed

.venv/.installed: requirements.lock
	@$(PYTHON) -m pipelines.install

demo: install ## Make three months of data, migrate and compute them, and print what came out.
	@$(BIN)/python -m pipelines.demo

dev: install ## Open Dagit, on the demo's data or on DATABASE_URL.
	@$(BIN)/python -m pipelines.demo.dev

# Tests wait for servers and processes as often as for a core: half as many more of them than cores.
TEST_WORKERS ?= 3

test: install ## Run the tests side by side, each worker on a PostgreSQL of its own.
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

lint: install ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock: install ## Pin the newest versions that pyproject.toml allows.
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --generate-hashes \
		--no-strip-extras --no-header --upgrade --quiet -o requirements.lock
	$(BIN)/uv pip compile --group bench --constraint requirements.lock --universal --python-version 3.11 \
		--generate-hashes --no-strip-extras --no-header --upgrade --quiet -o tests/benchmarks/requirements.txt

# The size of the stats' benchmark: `make bench SIZE=full` takes hours.
SIZE ?= small

bench: .venv/.bench ## Measure against the limits, on a PostgreSQL of its own; a small size. See docs/performance.md.
	$(BIN)/python -m tests.benchmarks.migration
	$(BIN)/python -m tests.benchmarks.stats --size $(SIZE)

# What only the benchmark compares with: nothing else needs it, so that `make install` leaves it out.
.venv/.bench: .venv/.installed tests/benchmarks/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r tests/benchmarks/requirements.txt
	touch $@

stop: ## Stop the embedded PostgreSQL.
	@test ! -d .venv || $(BIN)/python -m pipelines.local

clean: stop ## Remove what was installed and made.
	rm -rf .venv .local .pytest_cache .mypy_cache .ruff_cache .hypothesis
