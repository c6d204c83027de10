# Everything sets itself up: `make demo` and `make test` need nothing before them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
DEMO := demo

.PHONY: setup demo test lint types layers docs clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade "pip>=25.1"
	$(PIP) install --constraint constraints.txt --group dev --editable .
	touch $@

demo: setup
	rm -rf $(DEMO)
	$(BIN)/halfmap simulate movies --n-movies 4 --width 1024 --height 1024 --pixel-size 1.8 --workers 2 --project $(DEMO)
	$(BIN)/halfmap run '$(DEMO)/Simulate/job001/Movies/*.tiff' --gain $(DEMO)/Simulate/job001/gain.mrc \
		--pixel-size 1.8 --dose-per-frame 1.5 --symmetry O --workers 2 --project $(DEMO)
	$(BIN)/halfmap status $(DEMO)
	@echo "The map beside the truth that the movies were simulated from:"
	$(BIN)/halfmap compare $(DEMO)/Simulate/job001/truth_map.mrc $$(ls -d $(DEMO)/PostProcess/job* | tail -1)/postprocess.mrc --align \
		--project $(DEMO)
	$(BIN)/halfmap denoise apply $$(ls $(DEMO)/Motion/job*/corrected_micrographs.star | tail -1) --project $(DEMO)
	@echo "Micrographs before and after denoising: $$(ls -d $(DEMO)/Denoise/job* | tail -1)/pictures"
	@echo "Open $(DEMO)/report.html"

test: setup
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/pyright

layers: setup
	$(BIN)/lint-imports

docs: setup
	$(BIN)/python docs/build_step_pages.py
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(DEMO) site
