# make demo: install, train the improved ViT on real digits, evaluate it, write the report.
# make serve: the same, and then its page at http://127.0.0.1:8000.
# make test: install what is missing, run the whole suite; with TURN=N a quarter of its long tests.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo serve test lint format install
demo: $(VENV)/installed
	$(BIN)/python -m vitcls.main --config=configs/vit_digits.py --workdir=runs/digits

serve: demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e ".[serve]"
	$(BIN)/python -m vitcls.serve --workdir=runs/digits

test: $(VENV)/installed-test
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -m "not slow" -n 2 --max-worker-restart=0 --dist loadfile --no-loadscope-reorder --durations=10 $(if $(TURN),--turn=$(TURN))

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The resolver of an old pip takes minutes longer.
$(VENV)/bin/python:
	$(PYTHON) -m venv --upgrade-deps $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e ".[test]"
	# By themselves: together with s3fs and gcsfs, which each want one fsspec, pip tries every version of everything.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e ".[hub]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e ".[onnx,tflite]"
	touch $@
