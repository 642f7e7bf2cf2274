# Every target sets up its own virtual environment in .venv the first time.
#   make PYTHON=python3.12 test     another interpreter
#   make JOBS=1 test                one test process

PYTHON ?= python3
JOBS   ?= 2
BIN    := .venv/bin
READY  := .venv/.ready

# Nothing below may download a model; what needs one brings it as a Python package.
OFFLINE := HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help demo test check check-slow check-lowest check-newest dist docs fix bench clean venv

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)  ## MovieLens-100K in minutes: prepare, train, blend, score, recommend, report
	$(OFFLINE) $(BIN)/l2rec demo --out runs/demo

test: $(READY)  ## the whole test suite: offline, no GPU
	$(OFFLINE) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

check: $(READY)  ## the gate: format, lint, types, import rules, tests, the documentation site among them
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict src
	$(BIN)/lint-imports
	@top=$$(sed -n 's/^## \[\([0-9][^]]*\)\].*/\1/p' CHANGELOG.md | head -n 1); \
	version=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml); \
	test "$$top" = "$$version" || \
	{ echo "pyproject.toml says $$version, the top of CHANGELOG.md says $$top: make them agree" >&2; exit 1; }
	$(OFFLINE) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

check-slow: $(READY)  ## the tests that take minutes: examples, the built package, large data
	$(OFFLINE) $(BIN)/python -m pytest -m slow -n 0

# Old releases warn of what newer ones of their dependencies deprecate: no error here. TESTS, as in
# `make check-lowest TESTS=tests/unit/test_cli.py`, runs some of them.
TESTS ?= tests
# On Linux, uv too would bring CUDA; it knows where the CPU builds of every version are.
UV_TORCH ?= $(if $(filter Linux,$(shell uname -s)),--torch-backend=cpu)

check-lowest: $(READY)  ## the tests with the lowest versions that pyproject.toml allows
	$(BIN)/uv venv --quiet --clear --python $(PYTHON) .venv-lowest
	$(BIN)/uv pip install --quiet --python .venv-lowest --resolution lowest-direct $(UV_TORCH) -e '.[minilm,dev]'
	$(OFFLINE) .venv-lowest/bin/python -m pytest -n $(JOBS) --dist loadfile -o filterwarnings=default $(TESTS)

check-newest: $(READY)  ## the tests with the newest versions there are
	$(BIN)/uv venv --quiet --clear --python $(PYTHON) .venv-newest
	$(BIN)/uv pip install --quiet --python .venv-newest $(UV_TORCH) -e '.[minilm,dev]'
	$(OFFLINE) .venv-newest/bin/python -m pytest -n $(JOBS) --dist loadfile $(TESTS)

dist: $(READY)  ## build the wheel and the sdist into dist/
	rm -rf dist
	$(BIN)/uv build --out-dir dist .

docs: $(READY)  ## the documentation site, into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

fix: $(READY)  ## format, and repair what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)  ## measure speed and memory, write docs/performance.md (DATA="data/a data/b")
	$(OFFLINE) $(BIN)/python benchmarks/performance.py $(if $(DATA),--data $(DATA))

clean:  ## remove the virtual environment, caches and builds (runs stay)
	rm -rf .venv .venv-lowest .venv-newest build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

venv: $(READY)

# PyTorch goes in first, because on Linux `pip install torch` brings gigabytes of CUDA. The
# CPU build carries the local version "+cpu", so asking for exactly that can never fetch the
# other one. pip first looks where it already looks (a wheel folder or a mirror set up on
# this machine); only if that has no such build is PyTorch's own CPU index asked. This way a
# machine that cannot reach that index never waits for it. Elsewhere than on Linux the
# ordinary build is a CPU build. For a GPU: install torch of your choice, then `pip install l2rec`.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH       := torch==$(shell sed -n 's/^torch==//p' constraints.txt)$(if $(filter Linux,$(shell uname -s)),+cpu)
PIP         := $(BIN)/python -m pip --disable-pip-version-check --retries 1

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "$(PYTHON) is missing or older than 3.11; set another: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@echo "installing $(TORCH)"
	@$(PIP) install --quiet --no-deps '$(TORCH)' 2>/dev/null || \
	$(PIP) install --quiet --no-deps --index-url $(TORCH_INDEX) '$(TORCH)'
	$(PIP) install --quiet -c constraints.txt -e '.[minilm,bench,dev]'
	@touch $@
