"""Rollouts: targets, tensors, files, and weights on their way to vLLM."""
