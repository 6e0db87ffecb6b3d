"""Fixtures that several test files ask for by name."""

import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pyro
import pytest

import pvi
from tests import scenarios


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compile", help="what fits do where a test does not say compile=")


def pytest_configure(config: pytest.Config) -> None:
    way = config.getoption("--compile")
    if way is not None:
        inspect.unwrap(pvi.fit).__kwdefaults__["compile"] = way


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--compile") is not None:
        without = [item for item in items if not _fits(item.path)]  # the same in `make test`
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if _fits(item.path)]
        for item in items:
            if "programs" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="is about runs of the programs"))


@cache
def _fits(file: Path) -> bool:
    """Whether there is a fit in a file of tests."""
    return "fit(" in file.read_text()


@pytest.fixture(scope="module", autouse=True)
def left_clean() -> Iterator[None]:
    """What a file leaves in Pyro's parameter store is no other file's."""
    yield
    pyro.clear_param_store()


@pytest.fixture
def isolated() -> Iterator[None]:
    """Double precision, an empty parameter store, seed 0; for `pytest.mark.usefixtures`."""
    with scenarios.isolated():
        yield
