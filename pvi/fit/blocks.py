"""Many steps of a training in one call, where nothing but steps happens between them."""

import time
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from pvi.compiled import SHARE, STEPS, Adam, Block, State, Unit, live
from pvi.engine.data import Batch, Data
from pvi.fit.compiled_training import SMALL, CompiledSteps
from pvi.fit.drift import leaves_in

OURS = ("pvi", "pyro", "zuko")
PLAIN = (nn.Linear, nn.ReLU, nn.Tanh, nn.Softplus, nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Blocks:
    """Takes as many steps at once as end where the training has to be looked at.

    That is where averages, validation, checkpoints, epochs and comparisons with the programs are
    due. Steps that come to bad numbers are forgotten, and the programs take them one by one.

    Args:
        training: `Training`, with its optimiser.
    """

    def __init__(self, training: Any):
        self._training, self._task = training, training.task
        self._possible = self._task.options.compile is not False and self._suits()
        self.every = 0  # steps between checkpoints
        limit = training.schedule.steps
        self.steps = CompiledSteps(self._task, limit, self._adam if self._possible else None)

    def take(self, batches: Iterator[Batch]) -> bool:
        """Take some steps; whether there were any.

        Args:
            batches: of the training.
        """
        training = self._training
        if not self._possible or self.steps.waits(training.step):
            return False
        count = self._room(training.step)
        given = [next(batches)]
        if given[0].indices is None:
            given *= count
        given += [next(batches) for _ in range(count - len(given))]
        known = self.steps.ready(given[0], training.step)
        block = None if known is None else known.block
        if known is not None and block is None:
            self._possible = False
        if known is not None and block is not None and self._run(known.unit, block, given):
            return True
        self.steps.paused = block is not None
        for batch in given:
            training.take(iter([batch]))
        self.steps.paused = False
        return True

    def loss(self, batch: Batch, step: int) -> Tensor:
        """The loss on a batch at the present parameters, times the batch's weight, nats.

        Args:
            batch: of the data.
            step: whose KL weights to take.
        """
        known = self.steps.known(batch) if self._alike else None
        if known is None or known.block is None:
            return batch.weight * self._task.evaluate(batch, step).loss
        plan = self._plan(known.unit, step, [1.0])
        state = _state(known.unit, self._training.optimizer)
        record = known.block.run(state, plan, _rows([batch]))[1]
        return record[0, known.unit.names.index("loss")]

    @cached_property
    def _alike(self) -> bool:
        """Whether the programs are known to do the same in training and in evaluation."""
        return self._possible and all(map(_has_one_mode, self._task.params.modules()))

    def _suits(self) -> bool:
        """Whether nothing of this training has to see every step."""
        training, task = self._training, self._task
        schedule, leaves = training.schedule, leaves_in(training.optimizer)
        ours = schedule.automatic and schedule.plateau is None and task.options.accumulate == 1
        return (
            ours
            and training.team.alone
            and type(task.data) is Data
            and all(x.device.type == "cpu" for x in leaves)
            and sum(x.numel() for x in leaves) <= SMALL
        )

    def _room(self, step: int) -> int:
        """Steps until something else than a step is due."""
        training, task = self._training, self._task
        if task.callbacks:
            return 1
        ends = [STEPS * (step // STEPS + 1), 1 << step.bit_length(), training.schedule.limit]
        if task.batch_size is not None:
            done = training.epochs.done % task.batches_per_epoch
            ends.append(step + task.batches_per_epoch - done)
        validated = 0 if training.validation is None else training.validation.every
        ends += [n * (step // n + 1) for n in (validated, self.every) if n]
        stages = training.schedule.stages
        if stages is not None:
            half = stages.start + stages.length // 2
            ends += [stages.start, stages.start + 1, half, stages.end, stages.finished or 0]
        return min(end for end in ends if end > step) - step

    def _run(self, unit: Unit, block: Block, given: list[Batch]) -> bool:
        """Take these steps in one call; whether all numbers are finite, else nothing is done."""
        training, count, begun = self._training, len(given), time.perf_counter()
        optimizer, before = training.optimizer, torch.get_rng_state()
        if not all("step" in optimizer.state[x] for x in live(unit)):
            return False  # after a return to a state before the first update
        names = {id(x): name for name, x in self._task.params.tensors().items()}
        trained = [names[id(x)] for x in live(unit)]
        rates = [training.schedule.factor(training.step + i) for i in range(count)]
        rows, plan = _rows(given), self._plan(unit, training.step, rates)
        start = _state(unit, optimizer)
        if training.averages is not None:
            means, known = training.averages.running(training.step)
            plan[:, SHARE] = 1.0 / torch.arange(known + 1.0, known + count + 1.0)
            if means:
                start = start._replace(average=torch.cat([means[n].reshape(-1) for n in trained]))
        try:
            state, record = block.run(start, plan, rows)
        except RuntimeError:  # of bad numbers, which the programs will name
            torch.set_rng_state(before)
            return False
        checked = [record[:, unit.names.index("loss")], record[:, -1], state.values, state.square]
        if not all(bool(x.isfinite().all()) for x in checked):
            torch.set_rng_state(before)
            return False
        training.recovery.passed(training, given[:1] if rows is None else given)
        parts = [block.split(x) for x in state]
        with torch.no_grad():
            for leaf, value, mean, square, _ in zip(live(unit), *parts, strict=True):
                leaf.copy_(value)
                moments = optimizer.state[leaf]
                moments["exp_avg"].copy_(mean)
                moments["exp_avg_sq"].copy_(square)
                moments["step"] += count
        means = {n: x.clone() for n, x in zip(trained, parts[-1], strict=True)}
        columns = dict(zip((*unit.names, "grad_norm"), record.T.tolist(), strict=True))
        first = optimizer.param_groups[0]["initial_lr"]
        columns["lr"] = [first * rate for rate in rates]
        training.close_block(count, columns, means, begun)
        return True

    def _plan(self, unit: Unit, start: int, rates: list[float]) -> Tensor:
        """The numbers of each step that are known beforehand."""
        training, steps = self._training, self.steps
        b1, b2 = training.optimizer.param_groups[0]["betas"]
        clip = self._task.options.clip_norm or torch.inf
        done = int(training.optimizer.state[live(unit)[0]]["step"])
        rows = []
        for i, rate in enumerate(rates):
            t, weights = done + i + 1, steps.weights(start + i)
            rows.append([rate / (1.0 - b1**t), (1.0 - b2**t) ** 0.5, clip, 1.0, *weights])
        return live(unit)[0].new_tensor(rows)

    def _adam(self, unit: Unit) -> Adam:
        """The optimiser's numbers for the parameters of a unit."""
        groups = self._training.optimizer.param_groups
        of = {id(x): group for group in groups for x in group["params"]}
        rates = [torch.full((x.numel(),), of[id(x)]["initial_lr"]).to(x) for x in live(unit)]
        return Adam(torch.cat(rates), groups[0]["betas"], groups[0]["eps"])


def _rows(given: list[Batch]) -> Tensor | None:
    """Row numbers of batches `(n, B)`."""
    rows = [batch.indices for batch in given if batch.indices is not None]
    return torch.stack(rows) if rows else None


def _has_one_mode(module: nn.Module) -> bool:
    """Whether a module alone, without its children, is known to have no training mode."""
    return type(module).__module__.split(".")[0] in OURS or isinstance(module, PLAIN)


def _state(unit: Unit, optimizer: torch.optim.Optimizer) -> State:
    """Parameters and moments as vectors, and no average yet."""
    leaves = live(unit)
    moments = [optimizer.state[x] for x in leaves]
    values, mean, square = (
        torch.cat([x.detach().reshape(-1) for x in xs])
        for xs in (leaves, [m["exp_avg"] for m in moments], [m["exp_avg_sq"] for m in moments])
    )
    return State(values, mean, square, torch.zeros_like(values))
