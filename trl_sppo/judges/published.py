"""Published pairwise oracles by name, for recipes. Each is loaded when its name is used."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "pairrm":
        from .pairrm import PairRMJudge

        return PairRMJudge("llm-blender/PairRM-hf")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}. It has: pairrm")
