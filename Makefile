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
	$(BIN)/halfmap simulate movies --n-movies 4 --width 1024 --height 1024 --project $(DEMO)
	$(BIN)/halfmap import movies '$(DEMO)/Simulate/job001/Movies/*.tiff' --gain $(DEMO)/Simulate/job001/gain.mrc \
		--dose-per-frame 1.5 --project $(DEMO)
	$(BIN)/halfmap motion Import/job002/movies.star --project $(DEMO)
	$(BIN)/halfmap ctf Motion/job003/corrected_micrographs.star --project $(DEMO)
	$(BIN)/halfmap curate Ctf/job004/micrographs_ctf.star --project $(DEMO)
	$(BIN)/halfmap pick blob Curate/job005/micrographs.star --project $(DEMO)
	$(BIN)/halfmap extract Curate/job005/micrographs.star --coordinates Pick/job006/autopick.star --pixel-size 2.8 --project $(DEMO)
	$(BIN)/halfmap class2d Extract/job007/particles.star --classes 8 --resolution 10 --project $(DEMO)
	$(BIN)/halfmap select Class2D/job008/model.star --project $(DEMO)
	$(BIN)/halfmap abinitio Select/job009/particles.star --symmetry O --project $(DEMO)
	$(BIN)/halfmap refine Select/job009/particles.star --reference InitialModel/job010/class001.mrc --symmetry O \
		--initial-lowpass 20 --project $(DEMO)
	$(BIN)/halfmap postprocess Refine/job011/run_half1_class001_unfil.mrc --mask Refine/job011/mask.mrc --project $(DEMO)
	$(BIN)/halfmap validate Refine/job011/run_half1_class001_unfil.mrc --mask Refine/job011/mask.mrc \
		--particles Refine/job011/particles.star --symmetry O --no-controls --project $(DEMO)
	$(BIN)/halfmap info $(DEMO) $(DEMO)/Ctf/job004/micrographs_ctf.star $(DEMO)/Refine/job011/particles.star
	@echo "Pictures: $(DEMO)/Simulate/job001/overview.png $(DEMO)/Import/job002/movies.png"
	@echo "          $(DEMO)/Motion/job003/summary.png $(DEMO)/Motion/job003/Micrographs/*.png"
	@echo "          $(DEMO)/Ctf/job004/summary.png and the pictures beside it"
	@echo "          $(DEMO)/Curate/job005/accepted.png $(DEMO)/Pick/job006/summary.png"
	@echo "          $(DEMO)/Extract/job007/*.png $(DEMO)/Class2D/job008/classes.png $(DEMO)/Select/job009/classes.png"
	@echo "          $(DEMO)/InitialModel/job010/maps.png $(DEMO)/Refine/job011/slices.png $(DEMO)/PostProcess/job012/fsc.png"
	@echo "          $(DEMO)/Validate/job013/report.html"

test: setup
	$(BIN)/python -m pytest -n auto --dist loadgroup

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
