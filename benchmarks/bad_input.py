"""Bad inputs: what pvi says, and what plain Pyro SVI does with the same programs and data."""

import math
import re
import warnings
from collections import Counter
from typing import Any

import pyro
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from benchmarks.common import parser, report
from tests import bad_inputs
from tests.bad.base import BadInput, data, model
from tests.scenarios import isolated

LENGTH = 100  # characters of Pyro's messages; those of pvi are whole


def ours(case: BadInput) -> tuple[str, str]:
    """The error and its message, with what a note of pvi adds; or how the input is taken."""
    try:
        case.run()
    except Exception as error:
        notes = [n for n in getattr(error, "__notes__", ()) if not n.startswith("pvi: besides")]
        return type(error).__name__, _line("; ".join([str(error), *notes]))
    return ("silent", "") if case.error else ("accepted", case.how)


def theirs(case: BadInput) -> tuple[str, str, str]:
    """Three steps of SVI with AutoNormal where there is no guide: outcome, error, message."""
    if not case.pyro:
        return "-", "", ""
    program = case.call.get("model", model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            guide = case.call.get("guide") or AutoNormal(program)
            svi = SVI(program, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
            args, kwargs = _arguments(case.call)
            losses = [float(svi.step(*args, **kwargs)) for _ in range(case.call.get("steps", 3))]
        except Exception as error:
            message = _line(str(error))
            clear = case.error and re.search(rf"(?<!\w){re.escape(case.culprit)}(?!\w)", message)
            return "clear" if clear else "obscure", type(error).__name__, message[:LENGTH]
    if case.error is None:
        return "works", "", ""
    loss = "" if math.isfinite(losses[-1]) else f"loss {losses[-1]}"
    if caught:
        return "warns", loss, _line(str(caught[0].message))[:LENGTH]
    return "silent", loss, ""


def _arguments(call: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    rows = call.get("data", data())
    more, named = call.get("args", ()), dict(call.get("kwargs") or {})
    if isinstance(rows, dict):
        return more, rows | named
    return (*(rows if isinstance(rows, tuple) else (rows,)), *more), named


def _line(text: str) -> str:
    """One line, the same in every run: without addresses in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", " ".join(text.split()))


def main() -> None:
    options = parser(__doc__).parse_args()
    rows: list[list[Any]] = []
    for group, name, make in bad_inputs.rows():
        with isolated(seed=options.seed):
            row = [group, name, *ours(make())]
            left = ", ".join(pyro.get_param_store().keys()) or "-"
        with isolated(seed=options.seed):
            rows.append([*row, left, *theirs(make())])
    header = ["group", "input", "pvi", "message", "left in the store"]
    header += ["Pyro outcome", "Pyro", "Pyro's message"]
    report("bad_input", header, rows, options.results)
    accepted = [row for row in rows if row[2] == "accepted"]
    refused = [row for row in rows if row[2] not in ("accepted", "silent")]
    print(f"{len(rows)} inputs: pvi refuses {len(refused)}, accepts {len(accepted)}")
    print(f"Pyro on those refused: {dict(Counter(row[5] for row in refused))}")
    print(f"Pyro on those accepted: {dict(Counter(row[5] for row in accepted))}")


if __name__ == "__main__":
    main()
