.PHONY: check docs format test quickstart

check:  ## style and types
	ruff check .
	ruff format --check .
	mypy

docs:  ## the pages, in docs/_build
	sphinx-build -W --keep-going -q -b html docs docs/_build

format:
	ruff check --fix .
	ruff format .

test:
	pytest

quickstart:
	trl-sppo quickstart
