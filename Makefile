# make demo trains and tests on synthetic data; make test runs the linter and the tests. Both install into .venv.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-processors gpu format clean

demo: $(VENV)/.user
	$(RUN) prepare_data.py phantom --out data/phantom
	rm -rf runs/demo
	$(RUN) train_acdc.py $(PHANTOM) --output_dir runs/demo $(SMALL)
	$(RUN) test_acdc.py --checkpoint runs/demo/best.pth --volume_path data/phantom/test_vol_h5 \
		--list_dir data/phantom/lists --overlays 1
	@echo "checkpoint: runs/demo/best.pth   log: runs/demo/train.log   curves: runs/demo/progress.png"
	@echo "per-case results: runs/demo/results_test/cases.csv   overlays: runs/demo/results_test/overlays/"

test: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest -m "not slow" -n 2 --dist loadfile

# Run the tests that are sensitive to rounding for several instruction sets, with 1 and 2 threads; about 15 minutes.
test-processors: $(VENV)/.dev
	for threads in 1 2; do \
		for processor in ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 NATIVE=1; do \
			echo "== $$processor, $$threads threads"; \
			env $$processor OMP_NUM_THREADS=$$threads $(RUN) -m pytest -q -m processors || exit 1; \
		done; \
	done

# All that needs a GPU. In the active environment: make gpu RUN=python. The training needs prepared ACDC in data/.
GPU_SECONDS := 3600
gpu:
	-$(RUN) -m pytest -m gpu
	-$(RUN) -m benchmarks.gpu --output runs/gpu
	-$(RUN) -m benchmarks.gpu --deterministic 1 --forms float32 bf16 compiled --output runs/gpu/deterministic
	timeout $(GPU_SECONDS) $(RUN) train_acdc.py --pretrained none --amp bf16 --compile --deterministic 0 \
		--output_dir runs/gpu/acdc --resume auto || test $$? = 124

format: $(VENV)/.dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf $(VENV) runs/demo data/phantom

PHANTOM := --root_path data/phantom/train_npz --volume_path data/phantom/test_vol_h5 --list_dir data/phantom/lists
SMALL := --model_scale pico --variant stable --pretrained none --img_size 96 --img_size_dmwla 64 --feature_dim 32 \
	--decoder_feature_dim 32 --warmup_iterations 60 --batch_size 8 --max_epochs 12 --base_lr 1e-3 --lr_schedule cosine

$(VENV)/.user: requirements.txt constraints.txt | $(VENV)/bin/uv
	$(VENV)/bin/uv pip install --quiet --python $(RUN) --compile-bytecode -r requirements.txt -c constraints.txt
	@touch $@

$(VENV)/.dev: requirements.txt requirements-baselines.txt requirements-export.txt requirements-dev.txt constraints.txt | $(VENV)/bin/uv
	$(VENV)/bin/uv pip install --quiet --python $(RUN) --compile-bytecode -r requirements-dev.txt -c constraints.txt
	@touch $@ $(VENV)/.user

$(VENV)/bin/uv:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 10) <= v <= (3, 13) and \
		f"{sys.executable} is Python {v[0]}.{v[1]}; expected 3.10 to 3.13: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check uv
