"""Plans of recipes, their memory, and advice, for `trl-sppo check`."""
