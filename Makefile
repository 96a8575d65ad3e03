.PHONY: check format test quickstart

check:  ## style and types
	ruff check .
	ruff format --check .
	mypy

format:
	ruff check --fix .
	ruff format .

test:
	pytest

quickstart:
	trl-sppo quickstart
