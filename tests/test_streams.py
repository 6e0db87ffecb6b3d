"""Rows that are not in memory: read batch by batch, each once, in an order that can be resumed."""

import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch
from pyro.nn import PyroModule
from torch import Tensor
from torch.nn import Linear, Module, Parameter
from torch.utils.data import DataLoader, Dataset, IterableDataset

import pvi
from pvi import datasets
from pvi.engine import stored
from pvi.engine.data import as_data
from pvi.engine.shuffle import Blocks
from pvi.errors import CheckpointError, DataError, GuideError, ModelError
from tests.scenarios import EXACT, local_model, mean_model, randn

pytestmark = pytest.mark.usefixtures("isolated")

N, BATCH = 50, 8
X = np.round(randn(N, 3).double().numpy(), 3) * (randn(N, 3, seed=1).numpy() > 0)
Y = np.arange(float(N))


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 20.0), obs=y)


class Items(Dataset):
    """Knows how often it was asked."""

    def __init__(self, noise: Callable[[], float] = lambda: 0.0) -> None:
        self.asked: list[int] = []
        self.noise = noise

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[np.ndarray, float]:
        self.asked.append(i)
        return X[i], Y[i] + self.noise()


class Stream(IterableDataset):
    """The rows in order, perhaps over and over."""

    def __init__(self, endless: bool = False) -> None:
        self.endless = endless

    def __iter__(self) -> Iterator[tuple[np.ndarray, float]]:
        yield from zip(X, Y, strict=True)
        while self.endless:
            yield from zip(X, Y, strict=True)


class Sliced:
    """What zarr's arrays are to us: shape, dtype, chunks and slices."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.shape, self.dtype = values, values.shape, values.dtype
        self.chunks = (4, *values.shape[1:])
        self.largest = 0

    def __getitem__(self, rows: slice) -> np.ndarray:
        self.largest = max(self.largest, rows.stop - rows.start)
        return self.values[rows]


def mapped(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    for name, values in (("x", X), ("y", Y)):
        np.save(folder / f"{name}.npy", values)
    x, y = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in "xy")
    return x, y


def hdf5(folder: Path) -> tuple[Any, Any]:
    file = h5py.File(tempfile.mkstemp(dir=folder)[1], "w")
    return file.create_dataset("x", data=X), file.create_dataset("y", data=Y)


def parquet(folder: Path) -> tuple[Any, Any]:
    pa: Any = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    columns = {"a": X[:, 0], "b": X[:, 1], "c": X[:, 2], "y": Y}
    pq.write_table(pa.table(columns), folder / "rows.parquet", row_group_size=7)
    read = datasets.parquet
    return read(folder / "rows.parquet", ["a", "b", "c"]), read(folder / "rows.parquet", "y")


def torch_csr(folder: Path) -> tuple[Tensor, Tensor]:
    return torch.as_tensor(X).to_sparse_csr(), torch.as_tensor(Y)


KINDS: dict[str, Callable[[Path], Any]] = {
    "memmap": mapped,
    "h5py": hdf5,
    "slices": lambda folder: (Sliced(X), Sliced(Y)),
    "slices and a tensor": lambda folder: (Sliced(X), torch.as_tensor(Y)),
    "parquet": parquet,
    "scipy CSR": lambda folder: (scipy.sparse.csr_matrix(X), Y),
    "torch CSR": torch_csr,
    "Dataset": lambda folder: Items(),
}
ORDERED = {"memmap", "scipy CSR", "torch CSR", "Dataset"}  # their rows are shuffled freely
LOADED: dict[str, Callable[[], Any]] = {
    "loader": lambda: DataLoader(Items(), batch_size=BATCH, shuffle=True),
    "workers": lambda: DataLoader(Items(), batch_size=BATCH, num_workers=2),
    "stream": lambda: Stream(),
    "loader of a stream": lambda: DataLoader(Stream(), batch_size=BATCH),
}
csr_is_beta = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")


def fit(data: Any, **options: Any) -> pvi.Fit:
    run = {"steps": 30, "seed": 0, "progress": False} | options
    return pvi.fit(regression, data=data, **run)


def read(data: Any, epochs: int = 1, **options: Any) -> list[Tensor]:
    """The outcomes, which are the rows' numbers, of each batch."""
    torch.manual_seed(3)
    rows = as_data(data, (), None, regression, batch_size=BATCH, **options)
    batches = [b for _ in range(epochs) for b in rows.batches(rows.batch_size(BATCH))]
    for batch in batches:
        x, y = batch.args
        assert x.dtype == torch.float64
        assert torch.equal(x, torch.as_tensor(X)[y.long()])
        if rows.numbered:
            assert batch.indices is not None and torch.equal(batch.indices, y.long())
    return [batch.args[1] for batch in batches]


@csr_is_beta
class TestStored:
    @pytest.mark.parametrize("name", KINDS)
    def test_same_fit_as_in_memory(self, name: str, tmp_path: Path) -> None:
        """On all rows, and in minibatches where these come in the same order."""
        data, memory = KINDS[name](tmp_path), (torch.as_tensor(X), torch.as_tensor(Y))
        options = [{}, {"batch_size": BATCH}] if name in ORDERED else [{}]
        for option in options:
            one, two = fit(memory, **option), fit(data, **option)
            assert two.history["bound"] == pytest.approx(one.history["bound"], abs=EXACT)
            draws = [f.posterior.predict(num_draws=3, seed=0)["y"] for f in (one, two)]
            torch.testing.assert_close(*draws)

    @pytest.mark.parametrize("name", KINDS)
    def test_every_row_once_an_epoch(self, name: str, tmp_path: Path) -> None:
        """Up to the last short batch; whose rows differ from epoch to epoch."""
        data = KINDS[name](tmp_path)
        epochs = read(data, epochs=2)
        per = N // BATCH
        for batches in (epochs[:per], epochs[per:]):
            seen = torch.cat(batches)
            assert len(seen) == len(seen.unique()) == per * BATCH
        assert not torch.equal(torch.cat(epochs[:per]), torch.cat(epochs[per:]))

    def test_only_what_is_needed_is_read(self) -> None:
        """A data set is not read as a whole before the first step."""
        items = Items()
        fit(items, steps=1, batch_size=BATCH)
        assert len(set(items.asked)) < 4 * BATCH < N

    def test_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Buffers of several blocks; rows left over come first from the next buffer."""
        blocks = Blocks(N, 4, 3)
        monkeypatch.setattr(Blocks, "of", lambda *args: blocks)
        data = (Sliced(X), Sliced(Y))
        batches = read(data)
        seen = torch.cat(batches)
        assert [len(b) for b in batches] == [BATCH] * (N // BATCH)
        assert len(seen.unique()) == len(seen)
        assert data[0].largest <= stored.PROBE
        rows = as_data(data, (), None, regression, batch_size=BATCH)
        for skip in range(1, 7):
            torch.manual_seed(3)
            rest = [b.args[1] for b in rows.batches(BATCH, skip=skip)]
            assert all(map(torch.equal, rest, batches[skip:])) and len(rest) == 6 - skip

    def test_blocks_are_fair(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each row is as likely as any other in the first batch of an epoch."""
        blocks = Blocks(48, 4, 3)
        monkeypatch.setattr(Blocks, "of", lambda *args: blocks)
        rows = as_data((Sliced(X[:48]), Sliced(Y[:48])), (), None, regression, batch_size=BATCH)
        count, times = torch.zeros(48), 1500
        for _ in range(times):
            first = next(rows.batches(BATCH))
            assert first.indices is not None
            count[first.indices] += 1
        p = BATCH / 48
        assert float((count / times - p).abs().max()) < 4.5 * (p * (1 - p) / times) ** 0.5

    def test_shares(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two processes' shares are the batch."""
        monkeypatch.setattr(Blocks, "of", lambda *args: Blocks(N, 4, 3))
        for data in (Items(), (Sliced(X), Sliced(Y)), (X, Y), DataLoader(Items(), batch_size=7)):
            rows = as_data(data, (), None, regression, batch_size=BATCH)
            size, parts = rows.batch_size(BATCH), []
            for part in ((0, 1), (0, 2), (1, 2)):
                torch.manual_seed(1)
                parts.append(list(rows.batches(size, part)))
            for whole, one, two in zip(*parts, strict=True):
                assert one.weight + two.weight == pytest.approx(2.0)
                both = [b.args[1] for b in (one, two) if b.weight]
                assert torch.equal(torch.cat(both), whole.args[1])

    def test_repeated_entries_of_csr(self) -> None:
        """They add, as in scipy."""
        x = scipy.sparse.csr_matrix(([1.0, 2.0, 4.0], [1, 1, 0], [0, 2, 2, 3]), shape=(3, 2))
        data = as_data(x, (), None, mean_model, batch_size=2)
        (rows,), _ = data.rows(torch.tensor([2, 0, 1]))
        assert rows.tolist() == [[4.0, 0.0], [0.0, 3.0], [0.0, 0.0]]


def outcomes_model(x: Tensor, y: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0, 1)), 1.0), obs=y)


class TestGuides:
    def test_rows_of_the_guide(self) -> None:
        """A guide with a row for each row of the data is set up on all of them."""

        class Outcomes(Items):
            def __getitem__(self, i: int) -> float:  # type: ignore[override]
                return Y[i]

        one, two = (
            pvi.fit(local_model, data=data, batch_size=BATCH, steps=40, seed=0)
            for data in (torch.as_tensor(Y), Outcomes())
        )
        assert one.history["bound"] == pytest.approx(two.history["bound"], abs=EXACT)
        assert two.posterior.sample(2)["z"].shape == (2, N)

    @pytest.mark.parametrize("table", [lambda x: torch.zeros(len(x)), lambda x: torch.zeros(N)])
    def test_function_with_rows(self, table: Callable) -> None:
        """In a stream nobody knows which rows they are."""

        def guide(x: Tensor, y: Tensor) -> None:
            loc = pyro.param("loc", lambda: table(x))
            with pyro.plate("data", len(x)) as rows:
                pyro.sample("z", dist.Normal(loc[rows], 1.0))

        for data in (Stream(), DataLoader(Items(), batch_size=BATCH)):
            number = N if isinstance(data, Stream) else None
            with pytest.raises(GuideError, match=r"'loc'.*does not say which rows"):
                pvi.fit(outcomes_model, guide, data, batch_size=BATCH, num_data=number, steps=2)

    @pytest.mark.parametrize("kind", [PyroModule, Module])
    def test_as_many_units_as_rows(self, kind: type) -> None:
        """A network may have a parameter with as many rows as the data."""

        class Guide(kind):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.last = Linear(1, N), Linear(N, 1)

            def forward(self, x: Tensor, y: Tensor) -> None:
                pyro.module("guide", self)
                hidden = self.first(y.unsqueeze(-1).to(torch.get_default_dtype())).tanh()
                with pyro.plate("data", len(x)):
                    pyro.sample("z", dist.Normal(self.last(hidden).squeeze(-1), 1.0))

        fit = pvi.fit(outcomes_model, Guide(), Stream(), batch_size=BATCH, num_data=N, steps=2)
        assert len(fit.history["bound"]) == 2

    @pytest.mark.parametrize("kind", [PyroModule, Module])
    def test_module_with_rows(self, kind: type) -> None:
        """A module's own table, read by the plate's numbers, is refused as a function's is."""

        class Table(kind):
            def __init__(self) -> None:
                super().__init__()
                self.loc = Parameter(torch.zeros(N))

            def forward(self, x: Tensor, y: Tensor) -> None:
                pyro.module("guide", self)
                with pyro.plate("data", len(x)) as rows:
                    pyro.sample("z", dist.Normal(self.loc[rows], 1.0))

        with pytest.raises(GuideError, match=r"loc'.*does not say which rows"):
            pvi.fit(outcomes_model, Table(), Stream(), batch_size=BATCH, num_data=N, steps=2)

    def test_laplace(self) -> None:
        """Its one look is at all rows."""
        modes = [
            pvi.fit(regression, pvi.guides.Laplace, data, batch_size=BATCH).posterior.sample(
                9, seed=0
            )
            for data in ((X, Y), Items())
        ]
        torch.testing.assert_close(modes[0]["w"], modes[1]["w"])

    def test_checks_look_at_rows(self, tmp_path: Path) -> None:
        """Additivity, and infinite values among the first rows."""

        def centred(x: Tensor, y: Tensor) -> None:
            regression(x - x.mean(), y)

        with pytest.raises(ModelError, match="site 'y' is not a sum over rows"):
            pvi.fit(centred, data=mapped(tmp_path), batch_size=BATCH, steps=2)
        bad = X.copy()
        bad[3, 1] = np.inf
        with pytest.raises(DataError, match="argument 'x' has inf in 1 of"):
            fit((Sliced(bad), Y), batch_size=BATCH)


class TestStreams:
    def options(self, name: str) -> dict[str, Any]:
        return {
            "stream": {"num_data": N, "batch_size": BATCH},
            "loader of a stream": {"num_data": N},
        }.get(name, {})

    @pytest.mark.parametrize("name", LOADED)
    def test_every_row_counts_once(self, name: str) -> None:
        """With a guide that is a point the mean over an epoch is the value on all rows."""

        def point(x: Tensor, y: Tensor) -> None:
            loc = pyro.param("loc", torch.full((3,), 0.3))
            pyro.sample("w", dist.Normal(loc, 1e-30).to_event(1))

        still = lambda p: torch.optim.SGD(p, lr=0.0)  # noqa: E731
        run = {"guide": point, "optimizer": still, "seed": 0, "progress": False}
        data = LOADED[name]()
        epoch = pvi.fit(regression, data=data, epochs=1, **self.options(name), **run).history
        whole = pvi.fit(regression, data=(X, Y), steps=1, **run).history
        assert len(epoch) == 7
        assert epoch["bound"].mean() == pytest.approx(whole["bound"][0], rel=1e-10)

    def test_endless(self) -> None:
        """It is not begun again; after as many rows as it stands for a batch is cut."""
        lengths = []
        rows = as_data(Stream(True), (), None, regression, batch_size=BATCH, num_data=20)
        for batch in rows.batches(BATCH):
            lengths.append(len(batch.args[1]))
            assert batch.size == 3 * lengths[-1]
            if len(lengths) == 6:
                break
        assert lengths == [8, 8, 4] * 2

    def test_posterior(self) -> None:
        """Draws of what belongs to no row; the rest says what it needs."""
        found = fit(Stream(), num_data=N, batch_size=BATCH, steps=300)
        assert set(found.posterior.sample(5)) == {"w"}
        assert found.diagnose(50).verdict == "not assessed"
        assert found.posterior.predict(torch.zeros(2, 3), num_draws=5)["y"].shape == (5, 2)
        for ask in (found.posterior.predict, found.posterior.draws, found.to_arviz):
            with pytest.raises(DataError, match="needs all 50 rows at once"):
                ask()

    def test_larger_than_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same where the rows could be read, but are too many."""
        monkeypatch.setattr(stored, "WHOLE", 100)
        found = fit(Items(), batch_size=BATCH)
        assert set(found.posterior.sample(5)) == {"w"}
        with pytest.raises(DataError, match="needs all 50 rows at once"):
            found.posterior.log_likelihood()

    ERRORS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {  # noqa: RUF012
        "length": (Stream, {"batch_size": BATCH}, "unknown length.*num_data="),
        "batch": (Stream, {"num_data": N}, "needs batch_size="),
        "number": (Stream, {"num_data": 0, "batch_size": 2}, "num_data must be a whole number"),
        "rows": (Items, {"num_data": N, "batch_size": 2}, "num_data is for streams"),
        "empty": (lambda: _Once(0), {"num_data": 4, "batch_size": 2}, "the stream has no rows"),
        "once": (lambda: _Once(9), {"num_data": 9, "batch_size": 2}, "anew each time"),
        "columns": (lambda: scipy.sparse.csc_matrix(X), {"batch_size": 2}, r"use x.tocsr\(\)"),
        "lengths": (
            lambda: (Sliced(X), Y[:-1]),
            {"batch_size": 2},
            "'x' has 50, 'y' has 49",
        ),
    }

    @pytest.mark.parametrize("name", ERRORS)
    def test_errors(self, name: str) -> None:
        data, options, message = self.ERRORS[name]
        with pytest.raises(DataError, match=message):
            fit(data(), **options)


class _Once(IterableDataset):
    """A generator that was made too early."""

    def __init__(self, rows: int) -> None:
        self.rows = iter(list(zip(X[:rows], Y[:rows], strict=True)))

    def __iter__(self) -> Iterator[Any]:
        return self.rows


def stop_at(last: int) -> list[Any]:
    return [lambda step: step.step == last]


@csr_is_beta
class TestResume:
    @pytest.mark.parametrize("name", [*KINDS, *LOADED])
    def test_bit_by_bit(self, name: str, tmp_path: Path) -> None:
        make: Any = LOADED[name] if name in LOADED else lambda: KINDS[name](tmp_path)
        if name == "workers":
            make = LOADED["loader"]  # one of them is enough: they take a second to start
        options = TestStreams().options(name) if name in LOADED else {"batch_size": BATCH}
        whole = fit(make(), **options)
        folder = tmp_path / "run"
        for last in (9, 20):
            fit(make(), checkpoint=folder, every=100, callbacks=stop_at(last), **options)
            random.seed(9)
        two = fit(make(), checkpoint=folder, **options)
        assert np.array_equal(whole.history["loss"], two.history["loss"])
        assert len(two.history) == 30

    def test_other_order(self, tmp_path: Path) -> None:
        """What draws from a random state of its own is refused in the middle of an epoch."""
        noise = np.random.default_rng(0)
        data = lambda: DataLoader(Items(noise.random), batch_size=BATCH)  # noqa: E731
        fit(data(), checkpoint=tmp_path, callbacks=stop_at(9))
        with pytest.raises(CheckpointError, match="don't give the same rows again"):
            fit(data(), checkpoint=tmp_path)

    def test_other_rows(self, tmp_path: Path) -> None:
        """A file with other values is another fit."""
        fit((Sliced(X), Sliced(Y)), batch_size=BATCH, checkpoint=tmp_path, callbacks=stop_at(9))
        with pytest.raises(CheckpointError, match="data 'x' was"):
            fit((Sliced(X + 1), Sliced(Y)), batch_size=BATCH, checkpoint=tmp_path)
