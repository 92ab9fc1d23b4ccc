# make setup: .venv with pinned requirements.  make demo: train, evaluate, sample, export.  make test: the whole suite.
# make notebooks: run them and write their outputs.  make faults N=100 MEMORY_SECONDS=3600 ONLY=kills,disk: docs/reliability.md.
# make fuzz N=100000 ONLY=images,orbax: hostile files for every reader, SECURITY.md.
# constraints.txt pins what Python 3.11 gets. Another one, as make test PYTHON=python3.12, gets the newest versions that
# setup.cfg admits, and neither torch nor compilers: the tests of those are skipped, and listed.
PYTHON ?= python3
PINNED := $(shell $(PYTHON) -c 'import sys; print(*["pinned"] * (sys.version_info[:2] == (3, 11)))')
DEMO_DIR ?= demo
DEMO_SECONDS ?= 290
BIN := .venv/bin
comma := ,
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(if $(PINNED),--constraint constraints.txt)
MMX := JAX_PLATFORMS=$(or $(JAX_PLATFORMS),cpu) $(BIN)/mmx

.PHONY: setup demo test faults fuzz notebooks clean

setup: .venv/ready

.venv/ready: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mmx needs python3 >= 3.11, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	@touch $@

.venv/ready-to-test: .venv/ready
	$(PIP) --editable '.[dev$(if $(PINNED),$(comma)torch$(comma)compilers$(comma)eval)]'
	@touch $@

demo: setup
	$(MMX) train --config experiments/tiny.py --workdir $(DEMO_DIR) --config.train.seconds=$(DEMO_SECONDS)
	$(MMX) eval --checkpoint $(DEMO_DIR)
	$(MMX) generate --checkpoint $(DEMO_DIR) --prompt "The state of the Union" --steps 300
	@rm -rf $(DEMO_DIR)/hf
	$(MMX) convert to-hf --checkpoint $(DEMO_DIR) --out $(DEMO_DIR)/hf
	@echo
	@echo "$(DEMO_DIR)/eval.json     bits per byte beside gzip and xz"
	@echo "$(DEMO_DIR)/curve.png     the training curve"
	@echo "$(DEMO_DIR)/metrics.jsonl one line a step;  tensorboard --logdir $(DEMO_DIR)/tensorboard"
	@echo "$(DEMO_DIR)/checkpoints   Orbax checkpoints: the same command goes on from the last"
	@echo "$(DEMO_DIR)/hf            the model in Hugging Face form: mmx.torch.load('$(DEMO_DIR)/hf')"

test: .venv/ready-to-test
	$(BIN)/ruff check .
	JAX_PLATFORMS=cpu OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

faults: .venv/ready-to-test
	$(BIN)/python tests/faults/run.py --n $(or $(N),100) --memory-seconds $(or $(MEMORY_SECONDS),60) $(if $(ONLY),--only $(ONLY))

fuzz: .venv/ready-to-test
	$(BIN)/python tests/fuzz/fuzz.py --n $(or $(N),10000) $(if $(ONLY),--only $(ONLY))

notebooks: .venv/ready-to-test
	rm -rf notebooks/run*/
	JAX_PLATFORMS=cpu $(BIN)/python notebooks/run.py notebooks/*.ipynb

clean:
	rm -rf .venv $(DEMO_DIR) notebooks/run*/
