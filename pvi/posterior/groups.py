"""What a run of draws gives to each group of an export."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pvi.errors import DataError
from pvi.posterior.draws import Run, Runner, stack
from pvi.posterior.psis import PSIS, khat_threshold, psis

if TYPE_CHECKING:
    from pvi.posterior.posterior import Posterior

Groups = dict[str, dict[str, Tensor]]
NO_EVENTS = ("log_likelihood", "log_prior", "sample_stats")  # one number a batch element
LOO = (
    "at draws from the guide, which are not the exact posterior's: az.loo, az.waic and az.compare "
    "take them for it, and then do not estimate the predictive density of new data. See the page "
    "'arviz' of pvi's documentation."
)


@dataclass(frozen=True)
class Wanted:
    """Which groups to fill besides `posterior` and `sample_stats`.

    Args:
        new: for `predictions`, the programs on new data.
    """

    predictive: bool = True
    log_likelihood: bool = True
    log_prior: bool = True
    prior: bool = False
    new: Runner | None = None

    def of(self, run: Run, keep: Any) -> Groups:
        """Values `(S, *shape)` by group and site, of the draws that are kept."""
        draws = run.draws()
        found: Groups = {"posterior": run.sample()}
        if self.predictive:
            found["posterior_predictive"] = run.predictive(run.runner.observed)
        if self.log_likelihood:
            found["log_likelihood"] = run.log_likelihood()
        if self.log_prior:
            found["log_prior"] = run.log_prior()
        if self.prior:
            found["prior"], found["prior_predictive"] = run.prior()
        if self.new is not None:
            names = [*run.runner.observed, *self.new.deterministic]
            found["predictions"] = stack([part.predictive(names) for part in run.on(self.new)])
        found["sample_stats"] = {"log_p": draws.log_p, "log_q": draws.log_q}
        return {
            group: {name: value[keep] for name, value in values.items()}
            for group, values in found.items()
        }


def weight_stats(
    posterior: "Posterior", log_ratios: Tensor, corrected: PSIS | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """For `sample_stats`: normalised log weights where they mean something, and attributes."""
    if corrected is not None:
        return {}, {
            "resampled": "systematic, by PSIS weights of draws from the guide",
            **_attrs(corrected),
        }
    caveats = posterior.caveats()
    if not caveats:
        try:
            found = psis(log_ratios.cpu())
        except DataError as error:
            caveats = [str(error)]
        else:
            return {"log_weight": found.log_weights}, _attrs(found)
    return {}, {"no_log_weight": "; ".join(caveats)}


def _attrs(found: PSIS) -> dict[str, Any]:
    num = len(found.log_weights)
    return {
        "khat": found.khat,
        "khat_threshold": khat_threshold(num),
        "ess": found.ess,
        "weighted_draws": num,
    }
