"""Self-Play Preference Optimization (SPPO) as a TRL trainer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

# Public names, imported when first used: `import trl_sppo` loads neither torch nor trl
_PUBLIC = {
    "SPPOConfig": "config",
    "SPPOTrainer": "trainer",
    "ServedRewardModel": "oracles.served",
    "inpo_loss": "objectives",
    "log_mean_exp_baseline": "objectives",
    "mean_preferences": "preferences",
    "mean_win_rates": "preferences",
    "preferences_from_answers": "preferences",
    "preferences_from_scores": "preferences",
    "select_completions": "objectives",
    "sppo_loss": "objectives",
    "sppo_targets": "objectives",
    "win_rates": "preferences",
    "win_rates_from_scores": "preferences",
}
_MODULES = {"config", "diagnostics", "evaluation", "judges", "objectives", "preferences", "trainer"}

if TYPE_CHECKING:
    from .config import SPPOConfig as SPPOConfig
    from .objectives import inpo_loss as inpo_loss
    from .objectives import log_mean_exp_baseline as log_mean_exp_baseline
    from .objectives import select_completions as select_completions
    from .objectives import sppo_loss as sppo_loss
    from .objectives import sppo_targets as sppo_targets
    from .oracles.served import ServedRewardModel as ServedRewardModel
    from .preferences import mean_preferences as mean_preferences
    from .preferences import mean_win_rates as mean_win_rates
    from .preferences import preferences_from_answers as preferences_from_answers
    from .preferences import preferences_from_scores as preferences_from_scores
    from .preferences import win_rates as win_rates
    from .preferences import win_rates_from_scores as win_rates_from_scores
    from .trainer import SPPOTrainer as SPPOTrainer


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC, *_MODULES])
