"""
Pairwise oracles: the probability that one completion beats another.

An oracle is any callable `oracle(prompts, first, second, **kwargs)`, or an `async def`, that returns for each of N
comparisons P(first beats second | prompt) in [0, 1], or `None` where it could not judge. Prompts and completions are
texts or lists of messages. Pass an oracle to [`SPPOTrainer`] as `preference_func`.
"""

from .gpm import GeneralPreferenceJudge as GeneralPreferenceJudge
from .llm import LLMJudge as LLMJudge
from .pairrm import PairRMJudge as PairRMJudge
from .ranking import LLMRanker as LLMRanker
