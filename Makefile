# make demo and make test need nothing but make and Python 3.11 or 3.12 (with venv); each makes its environment
# once and uses it again. PYTHON=python3.12 picks another interpreter, ARGS= goes to pytest.
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
ifeq ($(filter $(VERSION),3.11 3.12),)
$(error Python 3.11 or 3.12 is needed, but $(PYTHON) is $(or $(VERSION),not there). Choose one with: make PYTHON=python3.12)
endif

VENV := $(if $(filter python3,$(PYTHON)),.venv,.venv-$(VERSION))
LOCK := requirements-$(VERSION).lock
# An environment is whole when its stamp is there and newer than what it was made from.
RUN_STAMP := $(VENV)/.run-$(VERSION)
DEV_STAMP := $(VENV)/.dev-$(VERSION)
INSTALL = $(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-compile --constraint $(LOCK) --requirement

# Modules are compiled when first imported, not at installation (which takes half as long for it).
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint format bench environment lock clean

demo: $(RUN_STAMP)
	@$(VENV)/bin/python -m demo.run

test: $(DEV_STAMP)
	$(VENV)/bin/python -m pytest $(ARGS)

lint: $(DEV_STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyrefly check --python-interpreter-path $(VENV)/bin/python

format: $(DEV_STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(DEV_STAMP)
	$(VENV)/bin/python bench/cpu/train.py
	$(VENV)/bin/python bench/cpu/decode.py
	$(VENV)/bin/python bench/cpu/evaluate.py
	$(VENV)/bin/python bench/cpu/loader.py
	$(VENV)/bin/python bench/cpu/tokenize.py

# Only makes the environment of the tests.
environment: $(DEV_STAMP)

# Resolves requirements-dev.txt afresh for this Python, from the default package index; once for each of the two.
lock:
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install -qq --dry-run --ignore-installed --report .venv-lock/report.json \
	  --requirement requirements-dev.txt
	.venv-lock/bin/python .ci/lock.py .venv-lock/report.json > $(LOCK)
	rm -rf .venv-lock

clean:
	rm -rf .venv .venv-3.11 .venv-3.12 .venv-lock .pytest_cache .ruff_cache .hypothesis

$(RUN_STAMP): requirements.txt $(LOCK)
	@echo 'Making $(VENV) for Python $(VERSION) (a minute from a warm package cache) ...'
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) requirements.txt
	@touch $@

# The first stamp is away while packages are added, so an environment left half made is made anew.
$(DEV_STAMP): $(RUN_STAMP) requirements-dev.txt requirements-kernels.txt
	@echo 'Adding what the tests need to $(VENV) (a minute or two from a warm package cache) ...'
	@rm $(RUN_STAMP)
	@$(INSTALL) requirements-dev.txt
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-compile --no-deps -r requirements-kernels.txt
	@touch $(RUN_STAMP) $@
