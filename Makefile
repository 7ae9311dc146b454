# Everything happens in .venv, made on first use from requirements.lock; a second call does not install again.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Tests beside each other, a process each; every one of them takes a gigabyte or two.
JOBS   ?= 2

.PHONY: install sweep study test docs survive fuzz verify verify-gpu conformance recipes recipes-page figures bench lint clean

install: $(READY)

$(READY): requirements.lock requirements-without-dependencies.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "exmy needs Python 3.11 or newer, and $(PYTHON) is %d.%d: make PYTHON=python3.11 ..." % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-without-dependencies.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

sweep: $(READY)
	$(BIN)/exmy sweep $(ARGS)

# A study of studies/ again, on a GPU: make study STUDY=seeds. What is missing of it is trained into runs/seeds, its digest goes
# into studies/results/seeds, and its claims are judged by it, or its alarms. Minutes: the head of its file says how many.
FOR_ALARMS = $(filter warning warning-english warning-6x256 curvature,$(STUDY))
UNCLAIMED  = $(or $(FOR_ALARMS),$(filter llama-120m,$(STUDY)))
study: $(READY)
	@test -f studies/$(STUDY).toml || { echo "make study STUDY=NAME, where studies/NAME.toml is a study"; exit 2; }
	$(BIN)/exmy sweep studies/$(STUDY).toml --out runs/$(STUDY) $(ARGS)
	$(BIN)/exmy export runs/$(STUDY) --digest studies/results/$(STUDY) $(if $(FOR_ALARMS),--alarms) --force
	$(if $(UNCLAIMED),,$(BIN)/exmy claims studies/results/$(STUDY))
	$(if $(FOR_ALARMS),$(BIN)/exmy alarms studies/results/$(STUDY) --horizon 100 --false-alarms 0.05)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

# The guide as a site, in docs/_build/html; a warning is an error, and notebooks are run. Half a minute.
docs: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html $(ARGS)

# 200 kills of small studies at random instants, files damaged between them; the same bits in the end. Ten minutes.
survive: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kill_harness --kills 200 $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kill_harness --kills 30 --workers 2 $(ARGS)

# Study files by a fuzzer that follows coverage; needs atheris (pip install -e ".[fuzz]"), which has wheels for Linux.
fuzz: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz_study -max_total_time=300 $(ARGS)

# All FP32 inputs of six formats, then every test of verification, the longer proofs among them; then those of the other tests.
verify: $(READY)
	$(BIN)/python -m verification.every_input
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest verification -m "proof or not proof" -n $(JOBS) $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m proof -n $(JOBS) $(ARGS)

verify-gpu: $(READY)
	$(BIN)/python -m verification.on_gpu $(ARGS)

# All libraries that are here, judged; docs/conformance.md and its picture made of that and of what a GPU said. Minutes.
RESULTS := benchmarks/results
conformance: $(READY)
	$(BIN)/exmy verify --matrix runs/conformance --json $(RESULTS)/conformance-cpu.json.gz
	$(BIN)/python -m exmy.conformance docs/conformance.md $(RESULTS)/conformance-cpu.json.gz $(RESULTS)/conformance-h100.json.gz

# Where each named recipe ends at 12 M parameters, 8 seeds. The results are here; make recipes RECIPES=runs/recipes-12m trains them
# again, on a GPU, and writes docs/recipes-12m.md and its picture of those.
RECIPES ?= studies/results/recipes-12m
recipes: $(READY)
	$(BIN)/exmy sweep studies/recipes-12m.toml --out $(RECIPES) $(ARGS)
	$(MAKE) recipes-page

recipes-page: $(READY)
	$(BIN)/exmy compare $(RECIPES) --page docs/recipes-12m.md --figure docs/recipes-12m.png

# docs/findings.md and its figures, of the datasets in studies/results that are there; trains nothing.
figures: $(READY)
	$(BIN)/python -m exmy.findings $(ARGS)

bench: $(READY)
	$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info docs/_build
