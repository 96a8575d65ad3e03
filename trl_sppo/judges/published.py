"""
Published pairwise oracles by name, for recipes: `preference_funcs: trl_sppo.judges.published.pairrm`.

Each is loaded when it is asked for. Options other than the defaults take a module of your own (docs/judges.md).
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "pairrm":
        from .pairrm import PairRMJudge

        return PairRMJudge("llm-blender/PairRM-hf")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}. It has: pairrm")
