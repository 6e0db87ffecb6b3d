"""All 20 splits of a UCI data set as one batch of networks, against one fit after the other."""

from pathlib import Path
from typing import Any

import torch

from benchmarks.bnn_uci import PLANS, Plan, Rows, read, trained
from benchmarks.common import parser, report, timed

HEADER = ("data", "steps", "networks", "as one batch, s", "one by one, s", "ratio")


def part(folder: Path, results: Any, seed: int, name: str, steps: int, singles: int) -> None:
    """Time both and keep the table.

    Args:
        singles: how many splits are fitted one by one; their time is scaled to all.
    """
    rows = read(folder, name).train
    plan, num = Plan(steps, PLANS[name].batch_size), rows.y.shape[1]
    with timed() as batch:
        trained(rows, torch.ones(num), "noise", plan, seed)
    with timed() as single:
        for k in range(singles):
            alone = Rows(rows.x[:, k], rows.y[:, k])
            trained(alone, torch.ones(()), "noise", plan, seed)
    one_by_one = single[0] * num / singles
    row = [name, steps, num, batch[0], one_by_one, one_by_one / batch[0]]
    row = [round(cell, 1) if isinstance(cell, float) else cell for cell in row]
    more = {"batch_note": f"one by one: {singles} splits, scaled to {num}"}
    report("bnn", HEADER, [row], results, key="batch", more=more)


if __name__ == "__main__":
    options = parser(__doc__, data=True)
    options.add_argument("--name", default="bostonHousing", choices=list(PLANS))
    options.add_argument("--steps", type=int, default=500)
    options.add_argument("--singles", type=int, default=20)
    given = options.parse_args()
    part(given.data, given.results, given.seed, given.name, given.steps, given.singles)
