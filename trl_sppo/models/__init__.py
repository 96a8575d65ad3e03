"""Loading models: adapters, checkpoints that lack weights, generation."""
