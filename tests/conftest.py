"""Fixtures that several test files ask for by name."""

from collections.abc import Iterator

import pytest

from tests import scenarios


@pytest.fixture
def isolated() -> Iterator[None]:
    """Double precision, an empty parameter store, seed 0; for `pytest.mark.usefixtures`."""
    with scenarios.isolated():
        yield
