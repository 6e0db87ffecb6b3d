"""Find the plates that follow the batch, and check that the model really is a sum over rows."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide, AutoGuideList
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor
from torch.distributions import biject_to

from pvi.engine.data import Data
from pvi.engine.subsampling import Minibatch, OwnNoise, plate_frames
from pvi.engine.traces import Program, density, deterministic_nodes, run_hidden, sample_nodes
from pvi.errors import GuideError, ModelError
from pvi.fit.distributed import ALONE, Team
from pvi.guides import Guide, prior_median

ROW_FREE = {  # Pyro's guides with one joint distribution over the latents of all rows
    "AutoDiagonalNormal",
    "AutoGaussian",
    "AutoIAFNormal",
    "AutoLaplaceApproximation",
    "AutoLowRankMultivariateNormal",
    "AutoMultivariateNormal",
    "AutoNormalizingFlow",
    "AutoStructured",
}


def data_plates(
    model: Program, data: Data, batch_size: int, named: Iterable[str] | None = None
) -> frozenset[str]:
    """Names of the plates whose size follows the batch's length, by tracing two lengths.

    Args:
        named: the user's word for it, which only has to name plates that do follow.

    Returns:
        The names; none if the model subsamples by itself (`pyro.plate(name, N, subsample=idx)`).

    Raises:
        ModelError: no plate follows the batch, one follows it without being the batch, a site
            changes shape outside any plate, or sites come and go.
    """
    n1 = _probe_size(data, batch_size)
    n2 = n1 // 2
    first, second = (sample_nodes(_trace(model, data, torch.arange(n))) for n in (n1, n2))
    if first.keys() != second.keys():
        raise ModelError(
            "the model's sites depend on the batch's length "
            f"({sorted(first.keys() ^ second.keys())}), so minibatches can't stand for the data. "
            "Fit without batch_size."
        )
    one, two = plate_frames(first), plate_frames(second)
    follow = {p for p in one if one[p][:2] == (n1, n1) and two.get(p, (0, 0))[:2] == (n2, n2)}
    native = {p for p in one if p not in follow and one[p][1] == two[p][1] != one[p][0]}
    if named is not None:
        return _named_plates(frozenset(named), follow, sorted(one))
    _check_odd(one, two, follow | native)
    _check_naked(first, second, follow | native)
    for name, node in first.items():
        inside = [f.name for f in node["cond_indep_stack"] if f.name in follow]
        if len(inside) > 1:
            raise ModelError(
                f"site '{name}' is inside two plates of the batch's length, {inside}; only one can "
                "be the data. Name it with plate=, or fit without batch_size."
            )
    if not follow and not native:
        raise ModelError(
            "no plate follows the batch: minibatches need the observations inside "
            f"`with pyro.plate(name, len(x))`. The plates are {sorted(one) or 'none'}."
        )
    return frozenset(follow)


def check_plate_names(plate: str | Iterable[str] | None, nodes: Iterable[Mapping]) -> None:
    """Refuse a name that no plate of the model has, also where there are no minibatches."""
    known = sorted({frame.name for node in nodes for frame in node["cond_indep_stack"]})
    for name in [plate] if isinstance(plate, str) else plate or ():
        if name not in known:
            raise ModelError(f"plate='{name}' does not exist. The plates are {known or 'none'}.")


def _named_plates(named: frozenset[str], follow: set[str], known: list[str]) -> frozenset[str]:
    for name in sorted(named - follow):
        what = "does not follow the batch's length" if name in known else "does not exist"
        raise ModelError(
            f"plate='{name}' {what}. The plates that follow it are {sorted(follow) or 'none'}, the "
            f"others {[p for p in known if p not in follow] or 'none'}."
        )
    return named


def _probe_size(data: Data, batch_size: int) -> int:
    """Rows to try the model on: a batch, but enough for halves that are not trivial."""
    return min(data.shown, max(batch_size, 8))


def _check_odd(one: Mapping, two: Mapping, known: set[str]) -> None:
    odd = [p for p in one if p not in known and one[p][0] != two[p][0]]
    if odd:
        raise ModelError(
            f"the size of plate '{odd[0]}' changes with the batch ({one[odd[0]][0]} and "
            f"{two[odd[0]][0]}) without being its length, as pairs or windows of data do. Fit "
            "without batch_size."
        )


def _check_naked(first: Mapping, second: Mapping, known: set[str]) -> None:
    for name, node in first.items():
        shapes = [(n[name]["fn"].batch_shape, n[name]["fn"].event_shape) for n in (first, second)]
        if shapes[0] != shapes[1] and not any(f.name in known for f in node["cond_indep_stack"]):
            raise ModelError(
                f"site '{name}' changes shape with the batch but is in no plate, so it can't be "
                "scaled to the whole data. Put it in `with pyro.plate(name, len(x))` instead of "
                "to_event."
            )


def check_additive(model: Program, data: Data, batch_size: int, plates: frozenset[str]) -> None:
    """Check that two halves of a batch add up to the whole, at the same latents.

    Raises:
        ModelError: naming the site that does not, as with `x.mean()` or `1 / len(x)` in the model.
    """
    n = _probe_size(data, batch_size)
    first = _trace(model, data, torch.arange(n), seed=1)
    whole = sample_nodes(first)
    values = whole | deterministic_nodes(first)  # a reparameterised site is asked for by its name
    same = _trace(model, data, torch.arange(n), given=values)
    halves = [torch.arange(n // 2), torch.arange(n // 2, n)]
    traces = [_trace(model, data, h, given=_rows(values, plates, h)) for h in halves]
    _check_effects(same.effects, traces[0].effects, plates)
    again, *parts = map(sample_nodes, (same, *traces))
    if any(not torch.equal(_total(whole[k])[0], _total(again[k])[0]) for k in whole):
        return  # random inside (dropout): halves can't be compared
    for name, node in whole.items():
        total, size = _total(node)
        sums = [_total(part[name])[0] for part in parts]
        local = any(f.name in plates for f in node["cond_indep_stack"])
        expected = [sums[0] + sums[1]] if local else sums
        tolerance = 1e-5 * (1.0 + float(size))
        if any(float((total - e).abs()) > tolerance for e in expected):
            raise ModelError(
                f"the log density at site '{name}' is not a sum over rows: two halves of a batch "
                f"give {[round(float(s), 4) for s in sums]}, the whole {float(total):.4f}. "
                "Something in the model mixes rows or depends on their number (x.mean(), 1 / "
                "len(x), BatchNorm). Compute it from all the data and pass it with args=, fit "
                "without batch_size, or, if it is intended, name the data plate with plate=."
            )


def _check_effects(whole: list[dict], half: list[dict], plates: frozenset[str]) -> None:
    """Refuse a `pvi.kl` or `pvi.penalty` of the rows outside their plate: it can't be scaled.

    Args:
        whole, half: what a batch and a half of it said, at the same latents.
    """
    values = {message["name"]: message["value"] for message in half}
    for message in whole:
        name = message["name"]
        inside = any(frame.name in plates for frame in message["cond_indep_stack"])
        if not inside and name in values and not _same(message["value"], values[name]):
            raise ModelError(
                f"pvi.{message['kind']} '{name}' depends on the batch's rows but is outside of "
                "their plate, so it can't be scaled to the whole data. Put it inside, one value "
                "for each row, or fit without batch_size."
            )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.isclose(a, b, rtol=1e-4, atol=1e-6).all())


def _trace(
    model: Program, data: Data, rows: Tensor, given: Mapping | None = None, seed: int = 0
) -> Any:
    """The model on some rows, latents at a random point or at `given`."""
    args, kwargs = data.rows(rows)

    def start(site: Mapping) -> Tensor:
        if given is not None:
            return given[site["name"]]["value"]
        try:
            transform = biject_to(site["fn"].support)
            loc = transform.inv(prior_median(site))
        except NotImplementedError:
            return site["fn"].sample()
        return transform(loc + 0.5 * torch.randn_like(loc))

    def seeded(*args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(seed)
        return model(*args, **kwargs)

    return run_hidden(InitMessenger(start)(seeded), args, kwargs)


def _rows(nodes: Mapping[str, dict], plates: frozenset[str], rows: Tensor) -> dict[str, dict]:
    """The nodes' values at some rows of the data plates."""
    result = {}
    for name, node in nodes.items():
        value = node["value"]
        for frame in node["cond_indep_stack"]:
            dim = None if frame.dim is None else frame.dim - node["fn"].event_dim
            if frame.name in plates and dim is not None and value.dim() >= -dim:
                value = value.index_select(dim, rows) if value.shape[dim] > 1 else value
        result[name] = {"value": value}
    return result


def _total(node: Mapping) -> tuple[Tensor, Tensor]:
    """Sum of a site's scaled log density, and of its absolute values, in float64."""
    log_prob = (density(node).log_prob().double() * node["scale"]).detach()
    return log_prob.sum(), log_prob.abs().sum()


class Minibatches:
    """Model and guide wrapped for minibatches of some plates; `select(batch)` before each call.

    The guide must have its parameters already, with one row for every row of the data.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        plates: frozenset[str],
        data: Data,
        team: Team = ALONE,
    ):
        numbered = data.numbered  # a DataLoader does not tell which rows it gives
        self._handlers = [Minibatch(plates, data.size, feed=feed) for feed in (False, numbered)]
        self._guide, self._plates, self._data = guide, plates, data
        self.model = self._handlers[0](model)
        self.guide = self._handlers[1](guide)
        if not team.alone:
            self.guide = OwnNoise(plates, team.rank)(self.guide)
        _check_rows(guide, plates, numbered)

    def select(self, indices: Tensor | None, size: int | None = None) -> None:
        """Use these rows in the next call, standing for `size` rows; `None` stands for all."""
        for handler in self._handlers:
            handler.indices, handler.size = indices, size or self._data.size
        _resize(self._guide, self._plates, self._data.size if indices is None else len(indices))

    def probe(self, batch_size: int) -> None:
        """Does the guide want row numbers of the data (`loc[i]`) or of the batch (`x[i]`)?

        Raises:
            GuideError: it seems to want both.
        """
        shown = self._data.shown
        end = self._data.size if self._data.numbered else shown
        last = torch.arange(end - min(batch_size, shown), end, device=self._data.device)
        args, kwargs = self._data.rows(last)
        self.select(last)
        try:
            run_hidden(self.guide, args, kwargs)
        except IndexError:
            self._handlers[1].feed = False
            self._check_own_rows(run_hidden(self.guide, args, kwargs))
        finally:
            self.select(None)

    def _check_own_rows(self, trace: Any) -> None:
        for name, node in trace.nodes.items():
            unread = node["type"] == "param" and node["kwargs"].get("event_dim") is None
            if unread and self._data.size in node["value"].shape:
                raise GuideError(
                    f"the guide indexes the batch with its plate's numbers, but its parameter "
                    f"'{name}' has {self._data.size} rows, one for each row of the data, which "
                    "need the data's numbers. Give pyro.param an event_dim= and use it without "
                    "index inside the plate; the batch needs no index either."
                )


def _check_rows(guide: Program, plates: frozenset[str], numbered: bool) -> None:
    """Refuse guides whose rows can't be matched with those of a batch."""
    if isinstance(guide, Guide):
        _check_bounds(guide, plates)
    for part in [guide, *(guide if isinstance(guide, AutoGuideList) else [])]:
        local = sorted(plates & _own_plates(part))
        name = type(part).__name__
        joint = part.coupled_plates if isinstance(part, Guide) else set(local)
        if plates & joint and (isinstance(part, Guide) or name in ROW_FREE):
            raise GuideError(
                f"{name} has one joint distribution over latents in all elements of plate "
                f"'{local[0]}', so they can't be fitted on minibatches. Use pvi.guides.Structured "
                "or Amortized (others for the rest: pvi.guides.Group), or no batch_size."
            )
        if local and not numbered:
            raise GuideError(
                f"{name} has parameters for each row of plate '{local[0]}', but a DataLoader or "
                "a stream does not say which rows it gives. Pass a map-style Dataset as data, with "
                "batch_size."
            )


def _check_bounds(guide: Guide, plates: frozenset[str]) -> None:
    """Refuse supports with a bound for each row: the guide has those of all rows at once."""
    for latent in guide.latents.values():
        if any(p.name in plates for p in latent.plates) and latent.bounds_differ:
            raise GuideError(
                f"the support of site '{latent.name}' has another bound in each row, which "
                f"{type(guide).__name__} can't follow through minibatches. Sample a fraction on a "
                "fixed support and make the site from it with pyro.deterministic, or fit without "
                "batch_size."
            )


def _own_plates(guide: Program) -> set[str]:
    """The plates whose rows have their own parameters in an automatic guide."""
    if isinstance(guide, Guide):
        return set(guide.plate_sizes)
    return set(getattr(guide, "_prototype_frames", {}))


def _resize(guide: Program, plates: frozenset[str], rows: int) -> None:
    """Pyro's automatic guides fix the size of their plates at the first call: change it."""
    frames = guide._prototype_frames if isinstance(guide, AutoGuide) else {}
    for name in plates & frames.keys():
        frames[name] = frames[name]._replace(size=rows)
