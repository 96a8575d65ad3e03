"""Win rates of one policy against another, with intervals."""

from .statistics import WinRate, length_controlled_win_rate, outcomes_of_scores, win_rate


__all__ = ["WinRate", "length_controlled_win_rate", "outcomes_of_scores", "win_rate"]
