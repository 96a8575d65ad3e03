"""Checks before anything is loaded: models, sources of scores, prompts, arguments."""
