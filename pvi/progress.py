"""A progress bar for whatever takes more than two seconds."""

from collections.abc import Iterable
from typing import Any


def progress(items: Iterable[Any], what: str, total: int | None = None) -> Iterable[Any]:
    """Go through `items` with a bar on terminals, from the second second on.

    Args:
        total: how many there are, where they do not say so themselves.
    """
    from tqdm.auto import tqdm

    return tqdm(items, desc=what, total=total, delay=2, disable=None, leave=False)
