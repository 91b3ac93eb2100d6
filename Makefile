# Python 3.11 or newer, make and git are all that this needs.
PYTHON ?= python3
FAULTS ?= 50
SEED ?= 0
CHAOS ?=
# One more than two cores: many tests wait for a server or a worker, and leave a core idle.
WORKERS ?= 3
MINUTES ?= 10
QUICK_FIT := --backbone vit_tiny_patch16_224 --rounds 1
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help repro test lint lowest docs fuzz compare chaos bench clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z.]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

repro: $(READY) ## Bring everything up to date: train, test, report.
	@$(BIN)/sdlora run

test: $(READY) ## Run all tests, WORKERS files at a time; print the slowest ten.
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=10

lint: $(READY) ## Check style, format, types and which room imports which.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache --no-logo

lowest: $(READY) ## Resolve the lowest versions that pyproject.toml allows, and compare.
	@$(BIN)/python .ci/lowest.py

docs: $(READY) ## Build the documentation into build/site; a broken link is an error.
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

fuzz: $(READY) ## Search for faulty inputs that get no answer, MINUTES long, other ones every time.
	@end=$$(($$(date +%s) + 60 * $(MINUTES))); while test $$(date +%s) -lt $$end; do \
	  SDLORA_FUZZ_EXAMPLES=500 $(BIN)/python -m pytest -q -m fuzz -n $(WORKERS) || exit 1; done

compare: $(READY) ## Run what is missing of the comparison of all methods (hours, fewer with SUITE=scene), write its page.
	@$(BIN)/python benchmarks/compare.py $(if $(SUITE),--suite $(SUITE)) --write

chaos: $(READY) ## Kill, stop and fill what two workers need, FAULTS times; compare what they make.
	@$(BIN)/python benchmarks/chaos.py --faults $(FAULTS) --seed $(SEED) $(CHAOS)

bench: $(READY) ## Measure speed as ratios (minutes); REFERENCE=PATH adds the released code, FULL=1 takes an hour.
	@$(BIN)/python benchmarks/fit_speed.py $(if $(FULL),,$(QUICK_FIT)) $(if $(REFERENCE),--reference $(REFERENCE))
	@$(BIN)/python benchmarks/data_path.py $(if $(FULL),,--quick)
	@$(BIN)/python benchmarks/fixed_costs.py $(if $(FULL),,--quick)
	@$(BIN)/python benchmarks/million_images.py $(if $(FULL),--images 1000000 --classes 10000)

clean: ## Remove the environment and what tools leave; results stay.
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The exact versions of requirements.lock, checked by hash, and this package as it stands in the tree. The lock is
# whole, so pip resolves nothing (--no-deps). Where a package asks for another's extra, pip would look at releases newer
# than the lock and refuse them (https://github.com/pypa/pip/issues/9644). `pip check` says if anything is missing.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip check --disable-pip-version-check
	@touch $@
