"""What a recipe would do and need: `trl-sppo check`."""
