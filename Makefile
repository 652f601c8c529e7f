# make quickstart   set up, then tokenize, pretrain and evaluate on the bundled sample
# make test         set up, then all tests: three files at a time, those that need Slurm one after the other
# make soak         set up, then the long forms of what must survive kills: hours
# make check        format, lint, types, house rules
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: setup quickstart test soak check format clean

setup: $(VENV)/installed

# torch: the index's default, a CUDA 13 build of several GB. Another build of it that is in $(VENV) already stays.
$(VENV)/installed: pyproject.toml constraints.txt
	@begin=$$(date +%s) && \
	$(PYTHON) -m venv $(VENV) && \
	$(BIN)/pip install --quiet -c constraints.txt torch && \
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]' && \
	touch $@ && \
	echo "installed in $$(( $$(date +%s) - begin )) s"

quickstart: setup
	@begin=$$(date +%s) && \
	$(BIN)/electra run configs/quickstart.yaml && \
	echo "done in $$(( $$(date +%s) - begin )) s after installation"

test: setup
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not soak"

soak: setup
	$(BIN)/python -m pytest -m soak

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest tests/test_house_rules.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache
