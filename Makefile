# The newcomer's two commands are `make quickstart` and `make test`. Both set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
# bf16 doubles the speed of a CPU that has it, and is slow on one that has not
PRECISION := $(shell grep -qs bf16 /proc/cpuinfo && echo bfloat16 || echo float32)

.PHONY: quickstart install test lint types clean

quickstart: $(VENV)/.installed  ## SLoRA on 20 Newsgroups: one server, three workers
	$(BIN)/slora-dist fetch minilm 20newsgroups
	rm -rf $(RUN)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 4 -m slora_dist train configs/quickstart.yaml \
		model.precision=$(PRECISION) --out $(RUN)

install: $(VENV)/.installed  ## a virtual environment in .venv, with slora-dist, torchrun and mpiexec in it

# torch is pinned and comes first: this keeps the CPU build where an index offers one, and no second torch is pulled in
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -e '.[mpi,dev]'
	touch $@

test: $(VENV)/.installed  ## all tests but those that need a cluster
	$(BIN)/python -m pytest -m "not cluster" tests

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs build *.egg-info
