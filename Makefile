# The newcomer's two commands are `make quickstart` and `make test`. Both set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
# bf16 doubles the speed of a CPU that has it, and is slow on one that has not
PRECISION := $(shell grep -qs bf16 /proc/cpuinfo && echo bfloat16 || echo float32)

.PHONY: quickstart install test test-cluster drill bench fuzz lint types audit-dependencies clean

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
	$(BIN)/python -m pytest -m "not cluster" -n logical --maxprocesses 4 --dist loadfile --max-worker-restart 1 tests

# Open MPI 5 cannot share an environment with MPICH: it has its own, and finds all else in .venv
FT := .venv-mpi-ft
$(FT)/.installed: pyproject.toml $(VENV)/.installed
	$(PYTHON) -m venv $(FT)
	$(BIN)/python -c "import tomllib; \
		print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['mpi-ft'], sep='\n')" > $(FT)/requirements.txt
	$(FT)/bin/python -m pip install -q -r $(FT)/requirements.txt
	for site in $(FT)/lib/python*/site-packages; do \
		echo "import site; site.addsitedir('$(CURDIR)/$(VENV)/$${site#$(FT)/}')" > $$site/venv.pth; done
	touch $@

# A real SLURM, several hosts as network namespaces, two more MPI libraries: as root, with Debian packages that are installed here.
PACKAGES := slurm-wlm munge iproute2 openmpi-bin shellcheck chromium
test-cluster: $(VENV)/.installed $(FT)/.installed  ## the tests that need a cluster
	@if dpkg -s $(PACKAGES) >/dev/null 2>&1; then :; \
	elif [ "$$(id -u)" = 0 ]; then apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(PACKAGES); \
	else echo "test-cluster: needs root, or: apt-get install $(PACKAGES)"; exit 1; fi
	$(BIN)/python -m pytest -m cluster tests

N ?= 100
# As root it plays on hosts with real links, too (iproute2), and with .venv-mpi-ft on an MPI that goes on without a rank.
drill: $(VENV)/.installed  ## N faults on purpose, each held against the run that was planned so; the table goes to drill.md
	OMP_NUM_THREADS=1 $(BIN)/python -m drill.run $(N) --out drill.md

bench: $(VENV)/.installed  ## every figure of docs/performance.md, on a machine with nothing else to do
	$(BIN)/slora-dist fetch minilm
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.run $(ROWS)
	$(BIN)/python -m benchmarks.scale_model

SECONDS ?= 120
fuzz: $(VENV)/.installed  ## frames, checkpoints and records that want to break their readers, SECONDS each
	$(BIN)/python -m pip install -q -e '.[fuzz]'
	for target in frames checkpoints records; do OMP_NUM_THREADS=1 $(BIN)/python -m fuzz.run $$target --seconds $(SECONDS) || exit 1; done

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

audit-dependencies: $(VENV)/.installed  ## whether a dependency has a known vulnerability, as far as PyPI can be asked from here
	$(BIN)/python .ci/audit_dependencies.py

clean:
	rm -rf $(VENV) $(FT) runs build *.egg-info
