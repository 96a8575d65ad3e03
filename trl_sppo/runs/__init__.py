"""Runs that end at any point and continue: checkpoints, signals, reports."""
