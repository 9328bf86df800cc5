# make demo    set up, fine-tune the mini model, show what changed
# make test    set up, check style and types, run every test, quick ones first, then every notebook
# make notebooks    run the course's sources in notebooks/src and store the notebooks; ONLY="02 04" for some of them,
#                   ONLY=--prose to take over new text without running
# make student    write the notebooks for a class, without outputs and solutions, into build/student; OUT=... elsewhere
# make mutants    plant errors in the package, one at a time, and see which notebook notices (tests/notebooks/mutants.txt);
#                   what was tried before is not tried again
# make soak    what takes hours: random kills, fuzzed operators and files, a long run, sanitizers; goes on where it
#              stopped; ARGS="operators --operators 1000" for a part of it
# make book    build README, course, guides, reference and reports as a static site, build/book/index.html
# make bench   set up, time the losses against every other way to compute them; ARGS="--operators haar" narrows it down
# make install-matrix   install into fresh environments; ROWS="no-compiler two-torches" or ROWS=all chooses, see --help
#
# All create .venv if there is none. PYTHON=python3.12 chooses the interpreter, VENV=... another place.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
BUILD  := pyproject.toml setup.py $(shell find csrc build_backend -type f -not -name '*.pyc')

# Threads that wait sleep: on two cores with a busy neighbor, waiting in a loop makes everything many times slower.
export OMP_WAIT_POLICY ?= PASSIVE
# Files of tests and notebooks run side by side, each on one thread: most are too small for a second thread to help.
# Each process takes about 2 GB.
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist loadfile

.PHONY: demo test notebooks student mutants soak book bench install-matrix clean

demo: $(VENV)/.installed
	$(BIN)/rfsr demo

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "slow"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE) --nbval --nbval-current-env --nbval-cell-timeout 600 notebooks

notebooks: $(VENV)/.installed-test
	OMP_NUM_THREADS=2 $(BIN)/python notebooks/build.py $(ONLY)

student: $(VENV)/.installed-test
	$(BIN)/python notebooks/build.py --student "$(or $(OUT),build/student)"

mutants: $(VENV)/.installed-test
	$(BIN)/python tests/notebooks/mutants.py $(ARGS)

soak: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 nice -n 15 $(BIN)/python -m tests.soak $(ARGS)

book: $(VENV)/.installed-book
	$(BIN)/python -m sphinx -q -W --keep-going -c docs . build/book

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks $(ARGS)

install-matrix: $(VENV)/.installed
	$(BIN)/python tests/packaging/install_matrix.py $(ROWS)

# Stamps: an unchanged second run installs nothing. torch comes first so that the extension is compiled against
# the torch that stays, instead of a second copy in a temporary build environment.
$(VENV)/.installed: $(BUILD) | $(BIN)/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install "torch>=2.11"
	$(BIN)/python -m pip install -e ".[train]"
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install -e ".[test]"
	touch $@

$(VENV)/.installed-book: $(VENV)/.installed
	$(BIN)/python -m pip install -e ".[book]"
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/python -m pip install -e ".[bench]"
	touch $@

$(BIN)/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
	  || { echo "rfsr_ext needs Python 3.11 or newer, got $$($(PYTHON) --version 2>&1); set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf build dist *.egg-info rfsr_ext/ops/_C_* rfsr_ext/ops/_build_record.json $(VENV)/.installed*
