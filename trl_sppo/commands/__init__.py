"""One module per command of `trl-sppo`: it parses arguments and prints."""
