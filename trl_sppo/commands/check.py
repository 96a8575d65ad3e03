"""`trl-sppo check`: a report on what a recipe does, the memory it needs, and what looks wrong."""

from argparse import ArgumentParser

from ..arguments.options import fail
from ..planning.advice import advise, describe
from ..planning.memory import peak
from ..planning.plan import read
from ..tables import as_table


def main(argv: list[str]) -> int:
    """Run `trl-sppo check` and return its exit status: 1 if something looks wrong."""
    parser = ArgumentParser(
        prog="trl-sppo check",
        usage="%(prog)s RECIPE [--gpu_memory GB] [--prompt_length TOKENS] [options of `trl-sppo train`]",
        description="Report what a recipe does, the memory it needs and what looks wrong, without weights or a GPU.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="A YAML file of options.")
    parser.add_argument("--gpu_memory", type=float, default=80.0, help="Memory of each GPU, in GB of 10^9 bytes.")
    parser.add_argument(
        "--prompt_length", type=int, default=1024, help="Longest prompt, in tokens, where vLLM does not bound it."
    )
    argv = argv[1:] if argv[:1] == ["--config"] else argv  # as in `trl-sppo train --config RECIPE`
    try:
        if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
            raise ValueError("no recipe given. Pass it first: trl-sppo check RECIPE.")
        options, rest = parser.parse_known_args(argv)
        if not (options.gpu_memory > 0 and options.prompt_length > 0):
            raise ValueError("gpu_memory (in GB) and prompt_length (in tokens) must be positive.")
        plan = read(options.recipe, rest, options.gpu_memory * 1e9, options.prompt_length)
        wrong, notes = advise(plan)
    except (ValueError, TypeError, ImportError, OSError) as error:
        fail(error)
    print("\n  ".join(["What it will do", *describe(plan)]))
    if plan.rows is not None:
        print(f"\nMemory on each GPU, by arithmetic (docs/memory.md), of {plan.place.gpu / 1e9:g} GB")
        value, phase = peak(plan.rows)
        cells = [[name, f"{size / 1e9:.2f}"] for name, size in plan.rows.items()]
        print(as_table(["what", "GB"], [*cells, [f"at most, while {phase}", f"{value / 1e9:.1f}"]]))
    for heading, lines in (("Looks wrong", wrong), ("Worth knowing", notes), ("Not known here", plan.unknown)):
        if lines:
            print(f"\n{heading}")
            print("\n".join(f"  - {line}" for line in lines))
    if not wrong:
        print("\nNothing looks wrong.")
    return 1 if wrong else 0
