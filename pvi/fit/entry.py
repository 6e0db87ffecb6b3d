"""`pvi.fit`: optimise any model, guide and objective on any data."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from threading import RLock
from typing import Any

import torch

from pvi.engine import Objective
from pvi.engine.checks import raise_first
from pvi.engine.numbers import check_seed, whole_number
from pvi.engine.traces import Program, preserved_rng
from pvi.errors import FitError
from pvi.fit.adversary import Adversary
from pvi.fit.arena import check_adversaries
from pvi.fit.arguments import check_options, known_arguments
from pvi.fit.callbacks import Callback
from pvi.fit.checkpoint import Checkpoints
from pvi.fit.distributed import join
from pvi.fit.guard import guarded
from pvi.fit.options import Options
from pvi.fit.precision import Precision
from pvi.fit.programs import prepare
from pvi.fit.progress import Progress
from pvi.fit.result import Fit
from pvi.fit.schedule import Schedule
from pvi.fit.trainer import Trainer
from pvi.fit.validation import read_held

ONE = RLock()  # fits in threads take turns: Pyro's handlers and torch's random numbers are global


@known_arguments
def fit(
    model: Program,
    guide: Program | None = None,
    data: Any = (),
    *,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    objective: Objective | None = None,
    optimizer: Any = "auto",
    lr: float | Mapping[str, float] | None = None,
    scheduler: Any = None,
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    num_data: int | None = None,
    accumulate: int = 1,
    clip_norm: float | None = None,
    precision: Precision | None = None,
    compile: bool | str = "auto",
    validation_data: Any = None,
    validate_every: int | None = None,
    patience: int | None = None,
    plate: str | Sequence[str] | None = None,
    reparam: Any = None,
    adversaries: Sequence[Adversary] = (),
    restarts: int = 0,
    device: Any = None,
    seed: int | None = None,
    progress: bool | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: Any = None,
    every: int | None = None,
) -> Fit:
    """Fit a guide to a model's posterior by maximising a variational bound.

    $$\\max_\\phi E_{q_\\phi(z)}[\\log p(x, z) - \\log q_\\phi(z)]
    \\quad\\text{(the default objective)}$$

    Args:
        model: any Pyro program; data enter through its arguments.
        guide: any Pyro program over the model's latents, or one of `pvi.guides` (a class, or an
            object with or without its model); `pvi.guides.MeanField` if `None`.
        data: the rows: an array or tensor, a tuple (positional arguments) or a dict (keyword
            arguments) of them, a `Dataset` or a `DataLoader`. Floating numpy arrays take torch's
            default dtype. With `batch_size`, arrays on disk (`np.memmap`, zarr, h5py,
            `pvi.datasets.parquet`), sparse CSR matrices and data sets are read batch by batch.
        args, kwargs: further arguments of the model that are not rows of data.
        objective: `pvi.ELBO()`, `pvi.IWAE(8)` ...; by default the ELBO with exact KL, of 8
            particles
            where the model is small, without networks and can batch them, else of one.
        optimizer: "auto": for the normal guides of `pvi.guides` on all the data, L-BFGS over fixed
            draws, until their Monte Carlo error is below 0.03 posterior sds; for all else, or with
            options that need steps (`steps`, `epochs`, `lr`, ...), "adam": Adam in stages of one
            rate, whose parameters are averaged. Or a callable that takes a list of parameters and
            returns a `torch.optim.Optimizer`, or such an optimiser over the programs' parameters.
        lr: first learning rate of "adam"; by default 0.05, for weights of networks 0.002. A dict
            gives rates by patterns of parameters' names, the first that fits:
            `{"guide:*scale*": 0.01, "model:*": 0.001}`; a callable `optimizer` is then given the
            groups (dicts with "params", "lr" and the pattern as "name") in place of the list.
        scheduler: a callable from the optimiser to one of torch's schedulers, stepped after every
            step (`ReduceLROnPlateau`: after every validation); it sets the rate of "adam" too.
        steps, epochs: how long (the rate then falls along a cosine); by default until averages
            gain less than 0.02 nats times the root of the number of latents, at most 20,000 steps
            or 100 epochs.
        batch_size: rows in a minibatch; by default all rows in every step.
        num_data: rows that an `IterableDataset` stands for.
        accumulate: batches to a step, whose gradients are averaged: for the ELBO the gradient of a
            batch of `accumulate * batch_size` rows, in the memory of a small one.
        clip_norm: scale gradients down to at most this norm.
        precision: "bf16" runs the programs under `torch.autocast` in bfloat16; parameters, draws,
            log densities, KLs and sums stay float32.
        compile: take Adam's steps by a graph of tensor operations captured from the programs, many
            of them in one call where nothing has to be looked at in between: "graph" without Pyro's
            work, `True` or "inductor" compiled to machine code (which takes seconds at the start),
            `False` by the programs. "auto" does what pays, by the number of steps. Programs that
            can't be captured run as they are; `Fit.notes` says what was done, and why not.
        validation_data: rows in the form of `data` that are not trained on. Their bound is recorded
            as `history["validation_bound"]`.
        validate_every: steps between two validations; by default once an epoch (and 50 steps).
        patience: end the fit after so many validations in a row without a better validation bound.
            With it, the parameters of the best one are restored at the end, however that came.
        plate: name(s) of the plates of the data, where they can't be found by themselves.
        reparam: other coordinates for the model's latents: "noncentered" for all whose location or
            scale depends on another latent, "learned" for a fitted degree of it, or what
            `pyro.poutine.reparam` takes. The sites stay in the posterior; guides that were made for
            the model as it was don't fit.
        adversaries: networks that are trained against the programs, see `pvi.Adversary`; with
            `steps` or `epochs`.
        restarts: so many further starts of the deterministic route, to find other modes: the fit is
            of the best, `Fit.modes` holds all, and `diagnose` refuses a fit that misses some.
        device: where to put data and modules, such as "cuda".
        seed: makes the fit repeatable and leaves the caller's random state alone.
        progress: a progress bar; by default on terminals, from the second second.
        callbacks: called with a `pvi.fit.Step` after each step; one that returns `True`, or the
            reason as a string, ends the fit. A method `on_end` of it is called with the `Fit`.
        checkpoint: a folder for checkpoints. If it holds some of this very fit, it goes on from the
            last good one, bit by bit (on a CPU) as if it had never stopped.
        every: steps between two checkpoints; by default there is one every half a minute.

    Under `torchrun` the processes share each batch, see the page on several processes.

    Returns:
        A `Fit`. Interrupting (Ctrl-C) returns what is there, with `converged=False`.

    Raises:
        DataError, ModelError, GuideError: before the first step, naming the site or argument.
        FitError: the loss stays infinite or NaN, also after the rate was lowered twice; it names
            the site or parameter and the row of the data where that began. Parameters keep their
            last finite values, and `error.fit` holds the fit so far.
        CheckpointError: the checkpoints are of another fit, or none can be read.

    >>> import pyro, torch, pyro.distributions as dist
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0., 10.))
    ...     with pyro.plate("data", len(y)):
    ...         pyro.sample("y", dist.Normal(mu, 1.), obs=y)
    >>> fitted = fit(model, data=torch.tensor([1., 2., 3.]), steps=300, seed=0)
    >>> bool(abs(fitted.posterior.sample(1000, seed=0)["mu"].mean() - 2.0) < 0.2)
    True
    """
    raise_first(check_options(model, guide, objective, seed, device, callbacks, plate, batch_size))
    seed, team = check_seed(seed), join(device)
    device = team.device(device)
    checkpoints = None if checkpoint is None else Checkpoints(checkpoint, every, team)
    if every is not None and checkpoint is None:
        raise FitError("every= is the time between checkpoints: give checkpoint=, their folder")
    restarts = whole_number("restarts", restarts, least=0)
    check_adversaries(adversaries, steps, epochs, team.alone)
    more = (compile, tuple(adversaries))
    options = Options(accumulate, clip_norm, precision, validate_every, patience, *more)
    with ExitStack() as stack:
        stack.enter_context(ONE)
        if seed is not None:
            stack.enter_context(preserved_rng())
            torch.manual_seed(seed)
        team.same_random()
        stack.enter_context(torch.device(device) if device is not None else nullcontext())
        state = stack.enter_context(guarded(model, guide, callbacks))
        programs = (model, guide, data, args, kwargs, reparam, device)
        model, guide, state.data = prepare(*programs, batch_size, num_data)
        held = None
        if validation_data is not None:
            held = read_held(validation_data, args, kwargs, model, device, batch_size)
        state.trainer = trainer = Trainer(
            model,
            guide,
            state.data,
            objective,
            batch_size,
            plate,
            list(callbacks),
            seed,
            options,
            held,
            restarts,
            team,
        )
        anneal, per_epoch = trainer.anneal(), trainer.steps_per_epoch
        latents = trainer.latents
        schedule = Schedule(per_epoch, steps, epochs, lr, optimizer, anneal, scheduler, latents)
        with Progress(progress if team.first else False, schedule.steps) as bar:
            return trainer.train(schedule, bar, checkpoints, device)
