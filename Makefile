# Every target works on a fresh machine with Python >= 3.10 and make: it builds its own virtual
# environment first, so neither root nor a writable system Python is needed.
#
#   make demo       a real RAG program, traced through a real server, shown in the terminal
#   make test       the test suite
#   make test-all   the test suite on every Python 3.10 to 3.13 found here
#   make interop    the same data in our hands and in those of the real EvalVault 1.88 (Python 3.12, a gigabyte)
#   make frameworks  the integrations against the oldest and the newest versions of their frameworks; NAMES=...
#   make beside     the SDK in one environment with the newest LangChain, LlamaIndex, Haystack and ragas
#   make soak       a million events in an outage, then five minutes of programs that are killed and a server that
#                   fails; SECONDS=60 SEED=7 to choose
#   make fuzz       all that the API describes, and much that it does not, asked of a real server; SECONDS=60 SEED=7
#   make docs       the API from its docstrings, and the guides, as pages in build/docs; fails on a broken link
#   make lint       lint, format check, strict types
#   make bench      what the speed claims rest on, beside seven other SDKs; ONLY=healthy,exit ROUNDS=5 to choose; ONLY=growth for
#                   the server with up to ten million events stored
#   make dist       wheel and sdist in dist/
#   make compiled   what every stage goes through, compiled, in this checkout; until `make interpreted`
#   make test-compiled  the tests of recording and delivery, compiled

PYTHON ?= $(shell sh tests/tools/find_python.sh)
VENV ?= .venv
BIN := $(VENV)/bin
SECONDS ?= 300

.PHONY: demo test test-all interop interop-here beside frameworks soak fuzz fuzz-here docs docs-here lint format bench bench-here
.PHONY: dist clean compiled interpreted test-compiled
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/evalvault-sdk demo

test: $(VENV)/.dev interpreted
	$(BIN)/python -m pytest $(ARGS)

#: What goes through compiled modules at every turn, and real programs that are killed.
COMPILED_TESTS := $(filter-out tests/capture/test_plain.py,$(wildcard tests/capture/test_*.py)) tests/path/test_chaos.py \
  $(addprefix tests/delivery/test_,queue_and_batch.py worker.py endings.py)

test-compiled: compiled
	$(BIN)/python -m pytest $(COMPILED_TESTS) $(ARGS); status=$$?; $(MAKE) --no-print-directory interpreted; exit $$status

compiled: $(VENV)/.dev
	$(BIN)/python hatch_build.py

interpreted:
	@find evalvault_sdk -name '*.so' -delete

test-all:
	@for version in 3.10 3.11 3.12 3.13; do \
	  python=$$(sh tests/tools/find_python.sh $$version 2>/dev/null) \
	    || { echo "== Python $$version is not on this machine: skipped"; continue; }; \
	  echo "== Python $$version ($$python)"; \
	  $(MAKE) --no-print-directory test PYTHON=$$python VENV=.venv-$$version || exit 1; \
	done

frameworks:
	sh tests/tools/frameworks.sh "$(PYTHON)" .venv-frameworks $(NAMES)

# EvalVault has an environment of its own: it pins other versions than `dev` wants, and needs a newer Python.
interop:
	@python=$$(sh tests/tools/find_python.sh 3.12 || sh tests/tools/find_python.sh 3.13) \
	  || { echo "EvalVault 1.88 needs Python 3.12 or 3.13, and neither was found"; exit 1; }; \
	$(MAKE) --no-print-directory interop-here PYTHON=$$python VENV=.venv-interop

interop-here: $(VENV)/.interop $(VENV)/tokenizer
	$(BIN)/python -m pytest tests/interop $(ARGS)

$(VENV)/tokenizer: | $(BIN)/python
	sh tests/tools/fetch_tokenizer.sh $(BIN)/python $@

beside:
	sh tests/tools/beside.sh "$(PYTHON)" .venv-beside

soak: $(VENV)/.dev
	OUTAGE_EVENTS=1000000 $(BIN)/python -m pytest tests/path/test_long_outage.py
	$(BIN)/python -m tests.path.chaos --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

# schemathesis has an environment of its own: it brings forty packages that nothing else needs.
fuzz:
	@$(MAKE) --no-print-directory fuzz-here VENV=.venv-fuzz

fuzz-here: $(VENV)/.fuzz
	$(BIN)/python -m tests.tools.fuzz --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

# pdoc has an environment of its own: nothing else needs it.
docs:
	@$(MAKE) --no-print-directory docs-here VENV=.venv-docs

docs-here: $(VENV)/.docs
	$(BIN)/python -m tests.tools.site build/docs

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The peers have an environment of their own: eighty packages of exact versions. Two of them need a newer Python.
bench:
	@python=$$(for version in 3.12 3.13 3.11; do sh tests/tools/find_python.sh $$version && break; done); \
	[ -n "$$python" ] || { echo "The peers need Python 3.11 to 3.13, and none was found"; exit 1; }; \
	$(MAKE) --no-print-directory bench-here PYTHON=$$python VENV=.venv-bench

bench-here: $(VENV)/.bench
	$(BIN)/python hatch_build.py
	$(BIN)/python -m benchmarks $(if $(ONLY),--only $(ONLY)) $(if $(ROUNDS),--rounds $(ROUNDS))

dist: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build

clean: interpreted
	rm -rf .venv .venv-3.* .venv-interop .venv-beside .venv-frameworks .venv-bench .venv-fuzz .venv-docs build dist
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.10 or newer was found: install one, or say make PYTHON=/path/to/python"; exit 1; }
	sh tests/tools/make_venv.sh "$(PYTHON)" "$(VENV)"

# A stamp per set of dependencies: `make demo` does not pay for what only developers need.
$(VENV)/.%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	@touch $@
