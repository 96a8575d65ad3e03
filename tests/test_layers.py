"""The packages stand in one direction: each imports only what stands below it."""

import ast
from pathlib import Path

import pytest

import trl_sppo


PACKAGE = Path(trl_sppo.__file__).parent

# From top to bottom. Of one line none imports another
LAYERS = [
    ["__init__"],  # public names, imported when they are first used
    ["__main__"],
    ["cli", "quickstart"],
    ["commands", "sample"],
    ["train"],
    ["trainer", "planning"],
    ["runs"],
    ["evaluation"],
    ["rollouts"],
    ["judges", "checks"],
    ["oracles", "arguments"],
    ["models"],
    ["config"],
    ["option_rules"],
    ["preferences", "objectives", "diagnostics", "trust", "errors", "files", "rows", "tables", "quiet"],
]
LEVEL = {name: len(LAYERS) - i for i, names in enumerate(LAYERS) for name in names}


def module_of(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if "recipes" not in path.parts}


def imports_of(module: tuple[str, ...], path: Path) -> set[tuple[str, ...]]:
    """Modules of this package that one imports, also inside functions."""
    package = module if path.name == "__init__.py" and module != ("__init__",) else module[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")[1:]) for alias in node.names if alias.name.startswith("trl_sppo.")}
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "trl_sppo"):
            parts = tuple((node.module or "").split(".")) if node.module else ()
            target = package[: len(package) - node.level + 1] + parts if node.level else parts[1:]
            for alias in [alias for alias in node.names if alias.name != "__version__"]:
                inner = (*target, alias.name)
                found.add(inner if inner in MODULES else target or ("__init__",))
    return found - {module}


@pytest.mark.parametrize("module", MODULES, ids=".".join)
def test_direction(module):
    path = MODULES[module]
    assert module[0] in LEVEL, f"{path.name} has no place in the direction of packages: see LAYERS"
    for other in imports_of(module, path):
        same = module[0] == other[0] and (PACKAGE / module[0]).is_dir()
        assert same or LEVEL[other[0]] < LEVEL[module[0]], (
            f"trl_sppo.{'.'.join(module)} imports trl_sppo.{'.'.join(other)}, which does not stand below it. The "
            "direction is in CONTRIBUTING.md."
        )


def test_there_is_no_circle():
    """Also not inside a package."""
    graph = {module: imports_of(module, path) for module, path in MODULES.items() if module != ("__init__",)}
    while graph:
        free = [module for module, others in graph.items() if not others & graph.keys()]
        assert free, f"these modules import each other in a circle: {sorted('.'.join(each) for each in graph)}"
        for module in free:
            del graph[module]
