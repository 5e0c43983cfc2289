# make demo   set up, draw the glyph shards, train for about three minutes, evaluate, write the report
# make bench  reader and losses beside open_clip's, mining beside the paper's, by ratio; about twenty minutes
# make test   set up, then lint, types, layers and tests: what CI runs
# make docs   set up, then the documentation into build/docs/index.html, every link checked: CI runs it, too
PYTHON ?= python3
BIN := .venv/bin
OBJECTIVE ?= softmax
DEMO ?= runs/demo-$(OBJECTIVE)

.PHONY: demo test docs lint bench clean

# the stamp is newer than pyproject.toml and constraints.txt only after a whole installation
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; give another: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e '.[test]' -c constraints.txt
	touch $@

demo: .venv/installed
	$(BIN)/python -m data_tools.glyphs data/glyphs
	$(BIN)/python -m clipsmall.train --config configs/demo.yaml \
		--objective.name=$(OBJECTIVE) --out=$(DEMO) --resume=auto
	$(BIN)/python -m clipsmall.report_page $(DEMO) --open

test: .venv/installed lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

# read, never imported: mkdocstrings needs the sources, not their packages
.venv/docs: .venv/installed
	$(BIN)/python -m pip install -q -e '.[docs]' -c constraints.txt
	touch $@

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --clean -f docs/mkdocs.yml
	@echo build/docs/index.html

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: .venv/installed
	$(BIN)/python -m tests.bench.reader
	$(BIN)/python -m tests.bench.losses
	$(BIN)/python -m tests.bench.mining --sizes 1280:32
	$(BIN)/python -m tests.bench.overhead

clean:
	rm -rf .venv .venv-bench build runs data
