"""The `trl-sppo` command as `python -m trl_sppo`."""

from .cli import main


if __name__ == "__main__":
    raise SystemExit(main())
