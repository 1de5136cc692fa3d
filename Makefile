# The two commands: `make quickstart` and `make test`. Each sets up .venv first if that is missing or old.
# Needed: Python 3.11 to 3.13 and make. Another interpreter: make test PYTHON=/path/to/python3.12

PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	$$p -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
RUN = .venv/bin
UV_VERSION = 0.13.8

.PHONY: quickstart test test-slow lint format constraints clean help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: .venv/.core  ## align the embedded model and show that it got better (3 minutes on 2 cores)
	@$(RUN)/mmalign quickstart $(ARGS)

test: .venv/.dev  ## the test suite; one file: make test ARGS=tests/test_storage.py
	@$(RUN)/python -m pytest -q -n 2 $(ARGS)

test-slow: .venv/.dev  ## the tests marked slow: the built wheel, the real SDXL configuration
	@$(RUN)/python -m pytest -q -m slow $(ARGS)

lint: .venv/.dev  ## ruff and pyright
	@$(RUN)/ruff check
	@$(RUN)/ruff format --check
	@$(RUN)/pyright

format: .venv/.dev  ## let ruff put the files in form
	@$(RUN)/ruff check --fix
	@$(RUN)/ruff format

constraints: .venv/.dev  ## pin the newest versions that pyproject.toml allows; torch and its kin stay as they are
	@grep -E '^(torch|torchvision|torchaudio|xformers)==' constraints.txt > .venv/pinned.txt
	@$(RUN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --upgrade --quiet \
		--no-header --no-annotate --no-emit-index-url -c .venv/pinned.txt -o constraints.txt

clean:  ## remove .venv and what the tools left
	rm -rf .venv dist build .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.core: EXTRAS =
.venv/.dev: EXTRAS = [dev]
.venv/.core .venv/.dev: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "mmalign needs Python 3.11, 3.12 or 3.13 with its venv module, and found none: install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "Setting up .venv with $(PYTHON), once: about 3 GB to download, 5.5 GB on the disk."
	@test -x $(RUN)/pip || $(PYTHON) -m venv .venv
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@$(RUN)/uv pip install --python $(RUN)/python -c constraints.txt -e '.$(EXTRAS)'
	@touch $@
