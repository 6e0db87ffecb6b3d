"""Two processes under torchrun give the fit of one, and go on after one of them is killed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

import pvi
from pvi.engine.subsampling import OwnNoise
from pvi.errors import FitError
from tests import team

ROW = team.Faulty.ROW


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("torchrun")
    options = ["--nproc-per-node=2", "--max-restarts=1", "--standalone", "-m"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "tests.team"]
    root = str(Path(__file__).parents[1])
    environment = os.environ | {
        "FOLDER": str(folder / "checkpoints"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": root,
    }
    done = subprocess.run(
        [*command, str(folder / "result")],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"result.{rank}").read_text()) for rank in (0, 1)]


def told(end: list[Any]) -> list[str]:
    """Without what differs in a share: the sizes of tensors, and rows of a loader."""
    sizes = r"at row \d+ of .*its batch|shape \(\d+,\)|\[\d+\]"
    return [re.sub(sizes, "...", str(text)) for text in end]


@pytest.mark.programs
@pytest.mark.usefixtures("isolated")
@pytest.mark.parametrize("name", team.CASES)
def test_equals_one_process(two: list[dict[str, Any]], name: str) -> None:
    """Same batches, same noise: bound, gradient norm, rate and end, up to rounding."""
    one = team.outcome(team.CASES[name]())
    for key, column in one["history"].items():
        other = two[0][name]["history"][key]
        assert [x is None for x in other] == [x is None for x in column], key
        same = pytest.approx([x for x in column if x is not None], rel=1e-8, abs=1e-8)
        assert [x for x in other if x is not None] == same, key
    assert told(two[0][name]["end"]) == told(one["end"])
    for key, value in one["parameters"].items():
        other = torch.tensor(two[0][name]["parameters"][key])
        torch.testing.assert_close(torch.tensor(value), other, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", [*team.CASES, *team.NOISY, "sampler"])
def test_processes_agree(two: list[dict[str, Any]], name: str) -> None:
    """Exactly: they are one fit."""
    assert two[0][name] == two[1][name]


@pytest.mark.usefixtures("isolated")
def test_noise_of_rows(two: list[dict[str, Any]]) -> None:
    """Drawn by each process for itself: another path to the same posterior."""
    one, other = team.outcome(team.NOISY["rows"]()), two[0]["rows"]
    assert one["history"]["loss"] != other["history"]["loss"]
    places = [key for key in one["parameters"] if "loc" in key]
    assert len(places) == 2
    for key in places:
        ends = [torch.tensor(found["parameters"][key]) for found in (one, other)]
        assert float((ends[0] - ends[1]).abs().max()) < 0.15, key  # posterior sds: 0.2 and 0.7


@pytest.mark.usefixtures("isolated")
def test_sampler_by_rank(two: list[dict[str, Any]]) -> None:
    """torch's DistributedSampler gives each process its own rows: they count once."""
    whole = team.fit(data=(team.X[:40], team.Y[:40]), batch_size=10).history["bound"]
    bound = torch.tensor(two[0]["sampler"]["history"]["bound"])
    assert float(bound[-8:].mean()) == pytest.approx(whole[-8:].mean(), rel=0.15)


def test_killed(two: list[dict[str, Any]]) -> None:
    """Bit by bit the fit that nobody killed."""
    for found in two:
        assert found["killed"] is True
        assert found["restarts"] == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weighting", "ObjectiveError: weighting= looks at a whole batch"),
        ("no plate", "ModelError: site 'y' changes shape with the batch"),
        ("other batches", "DataError: the 2 processes read different batches"),
        ("bad row", f"FitError: step 11: site 'y' has a log density that is NaN at row {ROW} of "),
        ("bad start", "FitError: step 3: the model fails after its site 'data'"),
        (
            "several modes",
            "FitError: restarts=2 needs the deterministic route, but 2 processes share",
        ),
        ("no rows", "FitError: several processes share the rows of the data"),
    ],
)
def test_refused(two: list[dict[str, Any]], name: str, message: str) -> None:
    for found in two:
        assert found[name].startswith(message)


def test_late(two: list[dict[str, Any]]) -> None:
    """A process whose programs fail can't tell the others before all of them look."""
    converged, _, first, *_ = two[0]["late"]["end"]
    assert not converged
    assert re.match(r"step 17: .*; went back to step 0", first)
    values = torch.tensor([x for xs in two[0]["late"]["parameters"].values() for x in xs])
    assert bool(values.isfinite().all())


@pytest.mark.usefixtures("isolated")
def test_own_noise_ends_with_an_error() -> None:
    """The common stream goes on where it was."""

    def fails() -> None:
        with pyro.plate("data", 2):
            probs = torch.full((2, 3), torch.nan)
            pyro.sample("k", dist.Categorical(probs=probs, validate_args=False))

    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="probability tensor contains"):
        OwnNoise({"data"}, 1)(fails)()
    found = torch.get_rng_state()
    torch.manual_seed(0)
    torch.randint(2**62, ())  # from which the noise of the rows starts
    assert torch.equal(found, torch.get_rng_state())


@pytest.mark.usefixtures("isolated")
def test_nobody_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of another system's are no torchrun; a single process is alone."""
    fit = lambda: pvi.fit(team.regression, data=(team.X, team.Y), steps=2, progress=False)  # noqa: E731
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert len(fit().history) == 2
    for name, value in {"RANK": "5", "MASTER_ADDR": "localhost", "MASTER_PORT": "70000"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FitError, match="WORLD_SIZE is 4, but the processes can't meet"):
        fit()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert len(fit().history) == 2
