.PHONY: help demo test test-slow ort-versions check fresh-code bench clean

help: ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: ## make .venv, install, and run the whole loop on this machine; then see demo/report.html
	@scripts/bootstrap demo
	@.venv/bin/refold demo $(ARGS)

test: ## make .venv where missing and run the tests with coverage, two files at a time
	@scripts/bootstrap dev
	@.venv/bin/python -m pytest -n 2 --dist loadfile --cov --cov-report=term:skip-covered -m "not slow" $(ARGS)

test-slow: ## the tests that take longer than a minute each
	@scripts/bootstrap dev
	@.venv/bin/python -m pytest -m slow $(ARGS)

ort-versions: ## the engine tests with every minor version of ONNX Runtime that devices may have
	@scripts/bootstrap dev
	@scripts/ort-versions $(ARGS)

check: ## lint, types, and freshness of the generated code
	@scripts/bootstrap dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	scripts/gen-protos --check

bench: ## a benchmark: make bench NAME=exactness ARGS=--quick
	@scripts/bootstrap dev
	@.venv/bin/python -m bench $(NAME) $(ARGS)

clean: ## remove .venv and everything that was built
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .coverage demo/report.html demo/report.json
