# make setup        creates .venv with mmx and its requirements
# make demo         trains a small model for five minutes, evaluates it, generates text and exports it
# make check        runs ruff and the fast tests, in under 3 minutes on two cores
# make test         runs ruff and the whole suite, as continuous integration does
# make cases        runs the tests of docs/cases.md and prints the result of each case
# make notebooks    runs the notebooks and stores their outputs
# make address      writes the address of the repository, url in setup.cfg, into the notebooks and README.md
# make findings     draws the figures of the experiments and writes docs/findings.md
# make docs         writes docs/configuration.md from the comments in mmx/config/schema.py
# make faults       runs the fault scenarios of docs/reliability.md; options: N=100 MEMORY_SECONDS=3600 ONLY=kills,disk
# make fuzz         gives malformed files to every reader (SECURITY.md); options: N=100000 ONLY=images,orbax
# make device       checks mmx on the GPU or TPU of this machine in under 8 minutes (docs/devices.md)
# make clean        deletes .venv, the demo's files and the notebooks' runs
#
# PYTHON=python3.12 chooses another Python; `make` builds .venv again if its Python has another version. constraints-3.11.txt and
# constraints-3.12.txt pin the versions of the packages; other Pythons get the newest ones that setup.cfg allows. Only Python 3.11
# gets torch, because a CPU build is pinned there; elsewhere pytest lists the tests that need it as skipped.
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
CONSTRAINTS := $(wildcard constraints-$(VERSION).txt)
READY := .venv/ready-$(VERSION)
DEMO_DIR ?= demo
DEMO_SECONDS ?= 290
BIN := .venv/bin
comma := ,
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(addprefix --constraint ,$(CONSTRAINTS))
PYTEST := JAX_PLATFORMS=cpu OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
MMX := JAX_PLATFORMS=$(or $(JAX_PLATFORMS),cpu) $(BIN)/mmx

# Fast tests: pure Python and small arrays.
CHECK := $(patsubst %,tests/%.py,test_style test_imports test_config test_counts test_frozen test_guards test_metrics test_lock \
  test_checksums test_optim test_security kernels/test_rope data/test_corpus data/test_packing data/test_sources data/test_tokens)

.PHONY: setup demo check test cases notebooks address findings docs faults fuzz device clean

setup: $(READY)

$(READY): setup.cfg pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mmx needs python3 >= 3.11, this is " + sys.version.split()[0])'
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != ($(subst .,$(comma),$(VERSION))))' 2> /dev/null || rm -rf .venv
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	@touch $@

$(READY)-to-test: $(READY)
	$(PIP) --editable '.[dev,compilers,eval$(if $(filter 3.11,$(VERSION)),$(comma)torch)]'
	@touch $@

demo: setup
	$(MMX) train --config experiments/tiny.py --workdir $(DEMO_DIR) --config.train.seconds=$(DEMO_SECONDS)
	$(MMX) eval --checkpoint $(DEMO_DIR)
	$(MMX) generate --checkpoint $(DEMO_DIR) --prompt "The state of the Union" --steps 300
	@rm -rf $(DEMO_DIR)/hf
	$(MMX) convert to-hf --checkpoint $(DEMO_DIR) --out $(DEMO_DIR)/hf
	@echo
	@echo "$(DEMO_DIR)/eval.json     bits per byte, compared with gzip and xz"
	@echo "$(DEMO_DIR)/curve.png     the training curve"
	@echo "$(DEMO_DIR)/metrics.jsonl one line for each step;  tensorboard --logdir $(DEMO_DIR)/tensorboard"
	@echo "$(DEMO_DIR)/checkpoints   Orbax checkpoints: the same command resumes from the latest"
	@echo "$(DEMO_DIR)/hf            the model in the Hugging Face format: mmx.torch.load('$(DEMO_DIR)/hf')"

check: $(READY)-to-test
	$(BIN)/ruff check .
	$(PYTEST) $(CHECK)

test: $(READY)-to-test
	$(BIN)/ruff check .
	$(PYTEST)

cases: $(READY)-to-test
	$(PYTEST) -m case

notebooks: $(READY)-to-test
	rm -rf notebooks/run*/
	JAX_PLATFORMS=cpu $(BIN)/python notebooks/run.py notebooks/*.ipynb

address:
	$(PYTHON) notebooks/address.py

findings: $(READY)-to-test
	JAX_PLATFORMS=cpu $(BIN)/python -m experiments.findings

docs: setup
	$(BIN)/python -m mmx.config.reference > docs/configuration.md

faults: $(READY)-to-test
	$(BIN)/python tests/faults/run.py --n $(or $(N),100) --memory-seconds $(or $(MEMORY_SECONDS),60) $(if $(ONLY),--only $(ONLY))

fuzz: $(READY)-to-test
	$(BIN)/python tests/fuzz/fuzz.py --n $(or $(N),10000) $(if $(ONLY),--only $(ONLY))

device: $(READY)
	extra=$$($(BIN)/python mmx/launch/runtime.py) && $(PIP) --editable ".[dev$${extra:+,$$extra}]" && if test "$$extra" = cuda13; \
	  then $(BIN)/python -m pip uninstall --yes --quiet jax-cuda12-plugin jax-cuda12-pjrt; rm -f $(READY)-to-test; fi
	$(BIN)/python tests/device/run.py

clean:
	rm -rf .venv $(DEMO_DIR) notebooks/run*/
