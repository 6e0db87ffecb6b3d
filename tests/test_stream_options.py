"""Rows that are not in memory, beside all else: validation, faults, checks and loading."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import pvi
from pvi.errors import DataError, FitError
from tests.scenarios import EXACT
from tests.test_streams import (
    BATCH,
    KINDS,
    LOADED,
    Items,
    N,
    Stream,
    X,
    Y,
    fit,
    regression,
    stop_at,
)

pytestmark = [
    pytest.mark.usefixtures("isolated"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning"),
]


class Sized(Stream):
    """A stream that says how many rows it has."""

    def __init__(self, said: int = N) -> None:
        super().__init__()
        self.said = said

    def __len__(self) -> int:
        return self.said


HELD: dict[str, Callable[[Path], Any]] = KINDS | {
    "loader": lambda folder: LOADED["loader"](),
    "stream": lambda folder: Sized(),
    "loader of a stream": lambda folder: DataLoader(Sized(), batch_size=9),
}
TRAIN = {"data": (X[:30], Y[:30]), "batch_size": BATCH, "steps": 12}


def point(x: Tensor, y: Tensor) -> None:
    """Without noise, so that it does not matter how the rows are parted."""
    loc = pyro.param("loc", torch.full((3,), 0.3))
    pyro.sample("w", dist.Normal(loc, 1e-30).to_event(1))


class TestValidation:
    @pytest.mark.parametrize("name", HELD)
    def test_equals_tensors(self, name: str, tmp_path: Path) -> None:
        """The same bound, wherever the rows are, and the same fit as without validation."""
        held = {"memory": (torch.as_tensor(X), torch.as_tensor(Y)), "other": HELD[name](tmp_path)}
        runs = [{"validation_data": rows, "validate_every": 4} for rows in held.values()]
        one, two, without = (
            pvi.fit(regression, point, seed=0, progress=False, **TRAIN, **run)
            for run in [*runs, {}]
        )
        columns = [found.history["validation_bound"] for found in (one, two)]
        known = np.isfinite(columns[0])
        assert known.sum() == 3
        assert columns[1][known] == pytest.approx(columns[0][known], rel=EXACT)
        assert np.array_equal(two.history["loss"], without.history["loss"])

    def test_patience(self) -> None:
        """It gets worse, for these rows are others."""

        class Other(Sized):
            def __iter__(self) -> Iterator[tuple[np.ndarray, float]]:
                return zip(X, -10 * Y, strict=True)

        found = fit(validation_data=Other(), validate_every=1, patience=2, **TRAIN | {"steps": 90})
        assert "stopped early: 2 validations in a row" in found.reason
        assert len(found.history) < 90

    def test_random_numbers_of_its_own(self) -> None:
        """A transform that draws from numpy's stream is not felt by one of the training data."""
        run = {"data": Items(np.random.rand), "batch_size": BATCH, "steps": 12}
        losses = []
        for held in (None, DataLoader(Items(np.random.rand), batch_size=4)):
            np.random.seed(3)
            losses.append(fit(validation_data=held, validate_every=None, **run).history["loss"])
        assert np.array_equal(*losses)

    @pytest.mark.parametrize(
        ("held", "options", "message"),
        [
            (Stream, {}, r"validation_data: .*unknown length.*__len__"),
            (Sized, {"batch_size": None}, "validation_data: an IterableDataset needs batch_size="),
            (
                lambda: DataLoader(Sized(), batch_size=4),
                {"batch_size": None},
                "validation_data are read in pieces, but the fit takes all rows at once",
            ),
            (lambda: Sized(60), {}, "stands for 60 rows, but gave 50 in a pass"),
        ],
    )
    def test_refused(self, held: Callable, options: dict[str, Any], message: str) -> None:
        with pytest.raises(DataError, match=message):
            fit(validation_data=held(), validate_every=2, **TRAIN | options)


class TestFaults:
    def bad(self, x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        loc = (x * w.unsqueeze(-2)).sum(-1)
        if torch.is_grad_enabled():
            loc = loc + torch.where(y == 17, torch.nan, 0.0)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc, 20.0, validate_args=False), obs=y)

    @pytest.mark.parametrize("name", KINDS)
    def test_row_of_the_data(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(FitError, match=r"NaN at row 17 of the data;"):
            pvi.fit(self.bad, data=KINDS[name](tmp_path), batch_size=BATCH, steps=90, seed=0)

    def test_row_of_a_stream(self) -> None:
        with pytest.raises(FitError, match=rf"NaN at row {17 % BATCH} of its batch;"):
            pvi.fit(self.bad, data=Sized(), batch_size=BATCH, steps=90, seed=0)


@pytest.mark.parametrize("name", ["stream", "memmap"])
def test_accumulated_steps_go_on_in_the_middle_of_an_epoch(name: str, tmp_path: Path) -> None:
    data = {"stream": Sized, "memmap": lambda: KINDS["memmap"](tmp_path)}[name]
    run = {"batch_size": BATCH, "accumulate": 3}
    whole = fit(data(), **run)
    for last in (4, 9):
        fit(data(), checkpoint=tmp_path / "run", callbacks=stop_at(last), **run)
    again = fit(data(), checkpoint=tmp_path / "run", **run)
    assert np.array_equal(whole.history["loss"], again.history["loss"])


class TestCheck:
    @pytest.mark.parametrize("name", HELD)
    def test_rows_elsewhere(self, name: str, tmp_path: Path) -> None:
        """It says how many there are, though it has read only some."""
        own = {"loader of a stream", "loader"}
        options = {} if name in own else {"batch_size": BATCH}
        found = pvi.check(regression, data=HELD[name](tmp_path), **options)
        assert found.ok
        size = 9 if name == "loader of a stream" else BATCH
        shown = rf"data: x (50, 3), y (50,); batches of {size} of 50 rows, which plate 'data'"
        assert any(note.startswith(shown) for note in found.notes)

    def test_random_states(self) -> None:
        """Also those of numpy and of the loader, which the rows were drawn from."""
        own = torch.Generator()
        data = DataLoader(Items(np.random.rand), batch_size=BATCH, shuffle=True, generator=own)

        def states() -> list[Any]:
            numbers = np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
            return [numbers, own.get_state().tolist(), torch.get_rng_state().tolist()]

        before = states()
        assert pvi.check(regression, data=data).ok
        assert states() == before

    def test_without_a_length(self) -> None:
        found = pvi.check(regression, data=Stream(), batch_size=BATCH)
        assert "num_data=" in str(found)
        assert pvi.check(regression, data=Stream(), batch_size=BATCH, num_data=N).ok


def test_fixed_draws_need_all_rows(tmp_path: Path) -> None:
    """In pieces the fit goes by steps; where they are read as a whole, it needs none."""
    with pytest.raises(FitError, match="deterministic route, but the data are read in pieces"):
        pvi.fit(regression, data=KINDS["memmap"](tmp_path), batch_size=BATCH, restarts=1)
    found = pvi.fit(regression, data=KINDS["memmap"](tmp_path), restarts=1, seed=0)
    assert found.converged


@pytest.mark.parametrize("name", ["stream", "Dataset"])
def test_loaded(name: str, tmp_path: Path) -> None:
    """Draws are the same; of rows on disk none is read before it is asked for."""
    data = {"stream": Stream, "Dataset": Items}[name]
    number = {"num_data": N} if name == "stream" else {}
    found = fit(data(), batch_size=BATCH, **number)
    found.save(tmp_path / "fit")
    again = pvi.load(tmp_path / "fit", regression, data=data(), **number)
    draws = [each.posterior.sample(5, seed=0)["w"] for each in (found, again)]
    assert torch.equal(*draws)
    if name == "Dataset":
        few = Items()
        pvi.load(tmp_path / "fit", regression, data=few)
        assert len(set(few.asked)) < N
