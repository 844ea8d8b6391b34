# Everything runs in .venv, which the first target makes. torch goes first: a range alone may bring gigabytes of CUDA.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-slow lint format docs families clean bench gpu-check

$(VENV)/.installed: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev,gguf,quantize]"
	touch $@

demo: $(VENV)/.installed
	rm -rf out/demo
	$(BIN)/moe2dense convert examples/tiny-mixtral --to 3.2m --tokens 140k --out out/demo
	$(BIN)/python examples/load_student.py out/demo/model

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2

test-slow: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable ".[slow]"
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/recovery.py

# on a machine with a GPU: its tests, then a Mixtral of real width and two layers, ending in a table
gpu-check: $(VENV)/.installed
	$(BIN)/python benchmarks/gpu_check.py

families: $(VENV)/.installed
	$(BIN)/python -m pytest --record-families -q tests/teacher/test_families.py tests/families/test_oracle.py tests/conversion/test_every_family.py
	$(BIN)/python docs/generate_families.py

docs: $(VENV)/.installed
	$(BIN)/python -c "import mkdocs, mkdocstrings" 2>/dev/null || $(BIN)/pip install --quiet --editable ".[docs]"
	$(BIN)/python .ci/modules.py
	$(BIN)/python docs/generate_reference.py
	$(BIN)/python docs/generate_families.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) out build dist site
