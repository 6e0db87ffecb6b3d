"""A progress bar for whatever takes more than two seconds."""

from collections.abc import Iterable, Sequence
from typing import Any


def progress(items: Sequence[Any], what: str) -> Iterable[Any]:
    """Go through `items` with a bar on terminals, from the second second on."""
    from tqdm.auto import tqdm

    return tqdm(items, desc=what, delay=2, disable=None, leave=False)
