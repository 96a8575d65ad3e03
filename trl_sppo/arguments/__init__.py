"""Command line and recipes: options, launching, datasets."""
