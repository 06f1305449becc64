# `make demo` and `make test` set themselves up on a fresh machine: Python 3.11 or newer is all they need.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo demo-radar demo-text demo-brain test test-all test-reliability lint docs bench bench-networks bench-digits bench-latent bench-radar bench-text bench-anomaly bench-gpu clean

demo: $(INSTALLED)
	$(BIN)/heterodiff demo

demo-text: $(INSTALLED)
	$(BIN)/heterodiff demo text

demo-brain: $(INSTALLED)
	$(BIN)/heterodiff demo brain

demo-radar: $(INSTALLED)
	$(BIN)/heterodiff demo radar

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" tests/devices
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-all: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/devices
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-reliability: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.reliability

lint: $(INSTALLED)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/python -m heterodiff.config.reference > docs/reference.md

bench: $(INSTALLED)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.backbone
	$(BIN)/python -m benchmarks.backbones speed

bench-networks: $(INSTALLED)
	$(BIN)/python -m benchmarks.backbones

bench-digits: $(INSTALLED)
	$(BIN)/python -m benchmarks.digits

bench-latent: $(INSTALLED)
	$(BIN)/python -m benchmarks.latent

bench-radar: $(INSTALLED)
	$(BIN)/python -m benchmarks.radar_gestures

bench-text: $(INSTALLED)
	$(BIN)/python -m benchmarks.text_image

bench-anomaly: $(INSTALLED)
	$(BIN)/python -m benchmarks.anomaly phantom others steps variants

bench-gpu: $(INSTALLED)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.gpu

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv
