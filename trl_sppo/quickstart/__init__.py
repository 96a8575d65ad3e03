"""A first SPPO run on real models that install from PyPI: no hub, no GPU."""
