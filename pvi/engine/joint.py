"""The terms of one run: of a guide's trace and of the model's, replayed against it."""

from collections.abc import Sequence
from typing import Any

from pvi.engine.enumeration import Enumeration, labels, reduced
from pvi.engine.pairing import pair
from pvi.engine.terms import Terms, make_terms
from pvi.engine.traces import Site

NONE = Enumeration()


def terms_of(
    guide_trace: Any,
    model_trace: Any,
    num_particles: int = 1,
    nesting: int | None = None,
    *,
    exact: bool = False,
    sites: list[Site] | None = None,
    enumeration: Enumeration = NONE,
) -> Terms:
    """The terms of a pair of traces, with what `pvi.kl` and `pvi.penalty` said in either.

    Args:
        nesting: number of plate dimensions under the particle plate; `None` if run without one.
        exact: use closed-form KLs where they are right.
        sites: the paired sites, where they are not simply those of the traces.
        enumeration: what was enumerated in both runs.
    """
    sites = pair(guide_trace, model_trace) if sites is None else sites
    if enumeration:
        sites = reduced(sites, guide_trace, model_trace, enumeration)
    how = exact_sites(sites, list(guide_trace.nodes)) if exact else {}
    if enumeration:
        how |= labels(sites, enumeration)
    effects = [*guide_trace.effects, *model_trace.effects]
    return make_terms(sites, how, num_particles, nesting, effects)


def exact_sites(sites: Sequence[Site], guide_order: list[str]) -> dict[str, str]:
    """For which latents the exact KL is right: "exact", or why it may not be.

    The prior of z may depend on every latent that precedes it in the model. The closed form is an
    expectation over z alone, so none of those may follow z in the guide, where they may depend on
    it.
    """
    model_order = [s.name for s in sites if s.p is not None and s.q is not None]
    position = {name: i for i, name in enumerate(guide_order)}
    exact = {}
    for i, name in enumerate(model_order):
        later = [other for other in model_order[:i] if position[other] > position[name]]
        follows = f"sample: prior may depend on '{later[0]}', later in the guide" if later else ""
        exact[name] = follows or "exact"
    return exact
