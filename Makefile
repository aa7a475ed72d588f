# make demo    from photographs to a table of pixel AUROC, in demo/
# make test    every test        make lint    ruff and mypy       make bench   ratios against peers
#
# make evidence DATA=FOLDER    every experiment of data_manifests/experiments, hours; ONLY=A,B for some
#
# Each installs by itself what it needs, into .venv; `make demo DEMO=/elsewhere` writes elsewhere.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

DEMO ?= demo
# The demo's size; the tests run it with small numbers.
DEMO_PHOTOGRAPHS ?=
DEMO_BUILD ?=
DEMO_TRAIN ?= --steps 300
DEMO_EVALUATE ?=

# Photographs: normals/KIND/, inspection/CATEGORY/ (layout of MVTec AD), weights/.
DATA ?= photographs
RUNS ?= runs/evidence
RESULTS ?= data_manifests/results
ONLY ?=

.PHONY: demo test bench lint evidence

demo: $(VENV)/installed-all
	$(BIN)/builder demo-data $(DEMO)/photographs $(DEMO_PHOTOGRAPHS)
	$(BIN)/builder build demo --normals demo --root $(DEMO)/photographs --out $(DEMO)/dataset $(DEMO_BUILD)
	$(BIN)/builder show $(DEMO)/dataset --out $(DEMO)/dataset.png
	$(BIN)/trainer pretrain --data $(DEMO)/dataset --out $(DEMO)/direct --loss direct --arch resnet18 $(DEMO_TRAIN)
	$(BIN)/trainer pretrain --data $(DEMO)/dataset --out $(DEMO)/indirect --loss indirect --arch resnet18 $(DEMO_TRAIN)
	$(BIN)/trainer show $(DEMO)/direct
	$(BIN)/trainer show $(DEMO)/indirect
	$(BIN)/evaluator padim --data $(DEMO)/photographs --out $(DEMO)/report \
	  --backbone random=random:resnet18 --backbone direct=$(DEMO)/direct --backbone indirect=$(DEMO)/indirect $(DEMO_EVALUATE)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest --numprocesses 2

# The results page says what all arms say: some alone do not write it anew.
evidence: $(VENV)/installed-all
	$(BIN)/evaluator evidence run --data "$(DATA)" --runs "$(RUNS)" $(if $(ONLY),--only "$(ONLY)") \
	  $(if $(ONLY),,|| failed=$$?; \
	  $(BIN)/evaluator evidence collect --data "$(DATA)" --runs "$(RUNS)" --results "$(RESULTS)"; exit $${failed:-$$?})

bench: $(VENV)/installed-dev
	$(BIN)/python -m tests.benchmarks

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@
