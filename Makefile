# make demo: the whole study on the bundled model, ends with the path of its report.
# make test: lint, types and tests; make check: without the slow tests, for every change at the desk.
# make docs: docs/ as a site in site/, without a warning.
# All make .venv and install what they need; again is quick.
PYTHON ?= $(shell command -v python3.11 || echo python3)
DEMO ?= relneuron-demo
VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# The oldest transformers that pyproject.toml allows, with what that needs in other versions, and the
# tests of all that calls it. The whole suite runs with the newest one.
OLDEST := transformers==5.0.0 tokenizers==0.22.2 huggingface-hub==1.33.0 \
          httpx==0.28.1 httpcore==1.0.9 h11==0.16.0 anyio==4.16.0 idna==3.20 certifi
OF_TRANSFORMERS := $(addprefix tests/,model/test_ask.py model/test_mlps.py model/test_patch.py model/test_patch_act.py \
                   model/test_gradients.py model/test_pictures.py ablation/test_generate.py \
                   ablation/test_generate_file.py ablation/test_pictures.py texts/test_tokens.py)
# Neighbours stay in one process, so that they share what they made, until another one has nothing
# left to do. A process takes 1 GB.
ON_ALL_CORES := -n auto --maxprocesses=8 --dist worksteal
INPUTS := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)

.PHONY: demo check test lint docs clean

demo: $(VENV)/.demo
	$(BIN)/relneuron demo -o $(DEMO)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint
	$(BIN)/pytest $(ON_ALL_CORES) --quiet -m "not slow"

test: lint $(VENV)/.oldest
	PYTHONPATH="$(CURDIR)/$(VENV)/oldest" $(BIN)/pytest $(ON_ALL_CORES) --quiet $(OF_TRANSFORMERS)
	$(BIN)/pytest $(ON_ALL_CORES) --durations=10

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(INPUTS)
	$(PIP) install -c constraints.txt -e '.[hf,cli,plot]'
	touch $@

$(VENV)/.test: $(VENV)/.torch $(INPUTS)
	$(PIP) install -c constraints.txt -e '.[test]'
	touch $@ $(VENV)/.demo

# Not installed beside the newest one: PYTHONPATH puts this folder before it.
$(VENV)/.oldest: $(VENV)/.test Makefile
	$(PIP) install --no-deps --upgrade --target $(VENV)/oldest $(OLDEST)
	touch $@

clean:
	rm -rf $(VENV) build dist site relneuron/_cpu*.so relneuron/_cpu*.pyd
