"""Ten bad inputs: what pvi says, and what plain Pyro SVI does with the same programs."""

import math
import warnings
from typing import Any

import pyro
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import pvi
from benchmarks.common import parser, report
from tests.bad_inputs import TEN, BadInput
from tests.scenarios import isolated

LENGTH = 100  # characters of a message


def ours(case: BadInput) -> tuple[str, str]:
    """Outcome and the first characters of the message."""
    try:
        pvi.fit(case.model, case.guide, data=case.data, steps=3, seed=0, **case.options)
    except Exception as error:
        return type(error).__name__, str(error)[:LENGTH]
    return "silent", ""


def theirs(case: BadInput) -> tuple[str, str]:
    """Three steps of SVI with AutoNormal where there is no guide."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            guide = case.guide or AutoNormal(case.model)
            svi = SVI(case.model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
            losses = [float(svi.step(*case.data)) for _ in range(3)]
        except Exception as error:
            return type(error).__name__, " ".join(str(error).split())[:LENGTH]
    loss = "" if math.isfinite(losses[-1]) else f"; loss {losses[-1]}"
    if caught:
        return "warns" + loss, " ".join(str(caught[0].message).split())[:LENGTH]
    return "silent" + loss, ""


def main() -> None:
    options = parser(__doc__).parse_args()
    rows: list[list[Any]] = []
    for name, make in TEN.items():
        with isolated(seed=options.seed):
            row = [name, *ours(make())]
            left = ", ".join(pyro.get_param_store().keys()) or "-"
        with isolated(seed=options.seed):
            rows.append([*row, left, *theirs(make())])
    header = ["input", "pvi", "message", "left in the store", "Pyro", "Pyro's message"]
    report("bad_input", header, rows, options.results)
    raised = [sum(r[i].endswith("Error") for r in rows) for i in (1, 4)]
    print(f"of {len(rows)}, pvi raises on {raised[0]}, Pyro on {raised[1]}")


if __name__ == "__main__":
    main()
