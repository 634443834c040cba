# make demo: set up, then SFT, DiPO and evaluation on the CPU.  make test: set up, lint, tests.
# make gpu: measurements on CUDA, with the packages that are there.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

demo: $(VENV)/ready
	$(BIN)/python benchmarks/demo.py $(DEMO)

test: $(VENV)/ready-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

# torch first and by itself: the other packages are then content with the build that is there.
$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

# LMDeploy's own scheduler, sampling and weight loader run in the tests, on any machine.
$(VENV)/ready-for-tests: $(VENV)/ready requirements-lmdeploy.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-lmdeploy.txt
	touch $@

# On a machine with a GPU, with the Python that has its torch: what only CUDA can show, in runs/gpu.
gpu:
	$(PYTHON) benchmarks/gpu.py $(GPU)

clean:
	rm -rf $(VENV) runs/demo

.PHONY: demo test gpu clean
