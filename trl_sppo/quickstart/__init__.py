"""A first SPPO run on real models that install from PyPI: no hub, no GPU."""

import sys
from importlib.util import find_spec


NEEDED = ("gguf", "vaderSentiment", "matplotlib")


def main(argv: list[str]) -> int:
    """Run `trl-sppo quickstart` and return its exit status."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(
            f"trl-sppo: error: the quickstart needs {', '.join(missing)}. Install the extra with "
            "`pip install 'trl-sppo[quickstart]'`.",
            file=sys.stderr,
        )
        return 2
    from .run import main as run

    run(argv)
    return 0
