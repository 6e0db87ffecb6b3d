"""The table of bad inputs, for the tests, the documentation and the benchmark."""

from collections.abc import Callable, Iterator

from tests.bad import options, programs, shapes, types, use, values
from tests.bad.base import TABLE, BadInput

MODULES = (values, shapes, types, programs, options, use)  # fill the table when they are read
ORDER = (
    values.GROUP,
    shapes.GROUP,
    types.GROUP,
    programs.MODELS,
    programs.SITES,
    programs.SUPPORT,
    programs.CHANGES,
    options.BATCHES,
    options.STEPS,
    options.RATES,
    options.SEEDS,
    options.REST,
    use.GROUP,
)


def rows() -> Iterator[tuple[str, str, Callable[[], BadInput]]]:
    """Group, name and maker of every row."""
    if set(ORDER) != set(TABLE):
        raise ValueError(f"groups without a place: {set(ORDER) ^ set(TABLE)}")
    for group in ORDER:
        for name, make in TABLE[group].items():
            yield group, name, make
