# Needs nothing but Python (3.11 or newer) and make; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= out/demo
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test test-fast test-browser test-oldest test-kaggle-image faults rehearsal fuzz bench check docs clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit(f"Python {v[0]}.{v[1]} found, 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]' ruff basedpyright
	@touch $@

# The notebooks with the demo corpus, at the size that learns something.
RUN = $(BIN)/papermill --kernel python3 --log-output --no-progress-bar
ON = -p out_dir $(OUT) -p trial False -p num_processes 2 -p batch_size 2 -y 'settings: {device: cpu}'

SHORT = settings: {device: cpu, max_steps: 160}

# A first, short run at a lower rate is there to be compared.
demo: setup
	@mkdir -p $(OUT)
	$(RUN) notebooks/pretrain.ipynb $(OUT)/slower.ipynb $(ON) -p run_name slower -p learning_rate 0.0003 -y '$(SHORT)'
	$(RUN) notebooks/pretrain.ipynb $(OUT)/pretrain.ipynb $(ON)
	$(RUN) notebooks/sft.ipynb $(OUT)/sft.ipynb $(ON) -p questions 20
	$(RUN) notebooks/curves.ipynb $(OUT)/curves.ipynb -p out_dir $(OUT)
	@echo "Open the notebooks in $(OUT) for curves and answers; the runs are there too."

# Two workers, since tests of processes mostly wait; a worker computes with one thread.
TEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --no-loadscope-reorder $(OPTIONS)

# The notebooks run as committed, as copies: a run beside the originals may be somebody's.
test: setup
	@rm -rf out/nbmake && mkdir -p out/nbmake && cp notebooks/*.ipynb out/nbmake
	$(TEST) --nbmake --nbmake-kernel=python3 out/nbmake tests

# Without notebooks and without the tests that start processes.
test-fast: setup
	$(TEST) --no-processes -r fE tests

# The notebooks in JupyterLab, clicked through in a headless Chromium; pictures of what
# they show are left in out/browser, and GALLERY=1 renews those in docs/images.
CHROMIUM = $(MINIMIND_NB_CHROMIUM) $(shell which chromium chromium-browser google-chrome 2>/dev/null)
NO_CHROMIUM = No Chromium found: apt-get install chromium, or set MINIMIND_NB_CHROMIUM to the path of one.

test-browser: .venv/.browser
ifeq ($(strip $(CHROMIUM)),)
	@[ "$$(id -u)" = 0 ] && apt-get install -y chromium fonts-noto-cjk || { echo "$(NO_CHROMIUM)"; exit 1; }
endif
	GALLERY=$(GALLERY) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser $(OPTIONS) tests/browser
	@echo "The pictures are in out/browser."

.venv/.browser: .venv/.ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,browser]'
	@touch $@

# The oldest versions that pyproject.toml admits. torch stays at the pinned version:
# 2.10.0 is several gigabytes, to be tried by hand.
OLD := .venv-oldest/bin

.venv-oldest/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	$(OLD)/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[test]'
	@touch $@

test-oldest: .venv-oldest/.ready
	$(OLD)/python -m pytest $(OPTIONS) tests

# The notebooks as Kaggle executes them, with the versions of its image; of those that
# its recipe does not name, the oldest that pyproject.toml admits. Its torch is 2.10.0
# with CUDA, several gigabytes: .venv-kaggle/bin/python -m pip install torch==2.10.0,
# then this again. PYTHON=python3.12 is the image's, if .venv-kaggle does not exist yet.
KAGGLE := .venv-kaggle/bin

.venv-kaggle/.ready: constraints-kaggle.txt
	$(PYTHON) -m venv .venv-kaggle
	$(KAGGLE)/python -m pip install --quiet --requirement constraints-kaggle.txt
	@touch $@

test-kaggle-image: .venv-kaggle/.ready
	OMP_NUM_THREADS=1 $(KAGGLE)/python -m pytest -m kaggle_image $(OPTIONS) tests/kaggle/test_image.py

# Every row of the list of faults, a thousand random kills, flipped bits: faults.md.
faults: setup
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python benchmarks/faults.py

# A run over a dozen sessions of a stand-in for Kaggle, which kills some and lies.
rehearsal: .venv-kaggle/.ready
	PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(KAGGLE)/python benchmarks/rehearsal.py $(OPTIONS)

# 13,600 random inputs to every reader, and a table of what became of them.
fuzz: setup
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz.py $(OPTIONS)

# Every speed as a ratio of two things measured in one run: some 15 minutes on two cores.
bench: setup
	@mkdir -p out
	$(BIN)/python benchmarks/speed.py --dtype float32 bfloat16 --out out/bench.jsonl $(OPTIONS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# The API reference, from the docstrings.
docs: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pdoc
	$(BIN)/python tools/repository.py
	$(BIN)/pdoc --output-directory out/docs minimind_nb
	@echo "Open out/docs/minimind_nb.html."

clean:
	rm -rf .venv .venv-oldest .venv-kaggle out build dist *.egg-info
