"""Join what model and guide said, site by site; refuse what does not fit together."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches

from pyro import poutine

from pvi.engine.masks import mask_for_guide
from pvi.engine.traces import PARTICLES, Site, density, plates_of, sample_nodes
from pvi.errors import GuideError, ModelError, PviError


def pair(guide_trace: poutine.Trace, model_trace: poutine.Trace) -> list[Site]:
    """Join both traces site by site, in the model's order, then the guide's auxiliary sites.

    Raises:
        GuideError: a latent of the model is missing from the guide, or the guide has a site that
            the model lacks and that is not marked `infer={"is_auxiliary": True}`.
    """
    q_nodes, p_nodes = sample_nodes(guide_trace), sample_nodes(model_trace)
    sites = []
    for name, node in p_nodes.items():
        observed = bool(node["is_observed"])
        guide_node = q_nodes.pop(name, None)
        if "_enumerate_dim" not in node["infer"]:  # else it is summed out
            _check_partner(name, observed, guide_node, q_nodes, p_nodes)
        if guide_node is not None:
            _check_plates(name, node, guide_node)
        sites.append(_site(name, node, guide_node, observed))
    for name, node in q_nodes.items():
        _check_extra(name, node, p_nodes)
        sites.append(_site(name, None, node, False))
    return sites


def mismatches(guide_trace: poutine.Trace, model_trace: poutine.Trace) -> Iterator[PviError]:
    """All that `pair` would refuse, one error a site; `pair` raises the first."""
    q_nodes, p_nodes = sample_nodes(guide_trace), sample_nodes(model_trace)
    rest = {name: node for name, node in q_nodes.items() if name not in p_nodes}
    for name, node in p_nodes.items():
        partner = q_nodes.get(name)
        try:
            if "_enumerate_dim" not in node["infer"]:
                _check_partner(name, bool(node["is_observed"]), partner, rest, p_nodes)
            if partner is not None:
                _check_plates(name, node, partner)
            _site(name, node, partner, bool(node["is_observed"]))
        except PviError as error:
            yield error
    meant = {_meant(name, rest) for name in p_nodes if name not in q_nodes}
    for name, node in rest.items():
        try:
            if name not in meant:
                _check_extra(name, node, p_nodes)
        except PviError as error:
            yield error


def observed_sites(model_trace: poutine.Trace) -> list[Site]:
    """What the model observes, whatever the guide does; without those that `pair` would refuse."""
    sites = []
    for name, node in sample_nodes(model_trace).items():
        try:
            sites += [_site(name, node, None, True)] if node["is_observed"] else []
        except PviError:
            continue
    return sites


def _check_partner(
    name: str, observed: bool, guide_node: dict | None, q_nodes: Mapping, p_nodes: Mapping
) -> None:
    if observed and guide_node is not None:
        raise GuideError(
            f"site '{name}' is observed in the model, but the guide samples it too. "
            "Sample in the guide only what the model leaves latent."
        )
    if not observed and guide_node is None:
        rest = {n: node for n, node in q_nodes.items() if n not in p_nodes}
        meant = _meant(name, rest)
        hint = f"The guide has '{meant}': is it meant to be '{name}'?" if meant else ""
        raise GuideError(
            f"site '{name}' is latent in the model, but the guide does not sample it. Add "
            f"pyro.sample('{name}', ...) to the guide, or pass obs= in the model if it is data; if "
            'it is discrete, infer={"enumerate": "parallel"} in the model sums it out. '
            + (hint or f"Sites in the guide only: {sorted(rest) or 'none'}.")
        )


def _check_extra(name: str, node: Mapping, p_nodes: Mapping) -> None:
    if node["infer"].get("is_auxiliary", False) or node["is_observed"]:
        return
    meant = _meant(name, {n: x for n, x in p_nodes.items() if not x["is_observed"]})
    raise GuideError(
        f"site '{name}' is sampled in the guide but not in the model. Remove or rename it, "
        'or mark it infer={"is_auxiliary": True} if the guide only needs it to build other '
        f"sites. The model's sites are {sorted(p_nodes)}."
        + (f" Is it meant to be '{meant}'?" if meant else "")
    )


def _meant(name: str, others: Mapping) -> str:
    """The name among the others that this one may be a misspelling of, or ""."""
    return next(iter(get_close_matches(name, list(others), 1)), "")


def _check_plates(name: str, p_node: Mapping, q_node: Mapping) -> None:
    """A site must have the same events and plates in both programs, of the same sizes."""
    p_event, q_event = p_node["fn"].event_shape, q_node["fn"].event_shape
    if p_event != q_event:
        raise GuideError(
            f"site '{name}' has event shape {tuple(p_event)} in the model but {tuple(q_event)} in "
            "the guide. Make them equal, with .to_event(...)."
        )
    p_plates, q_plates = (
        {plate.name: plate.full_size for plate in plates_of(node) if plate.dim is not None}
        for node in (p_node, q_node)
    )
    if p_plates.keys() != q_plates.keys():
        raise GuideError(
            f"site '{name}' is in the plates {p_plates or 'none'} in the model but "
            f"{q_plates or 'none'} in the guide. Put it in the same plates in both."
        )
    for plate, size in p_plates.items():
        if q_plates[plate] != size:
            raise GuideError(
                f"plate '{plate}' around site '{name}' has {size} elements in the model and "
                f"{q_plates[plate]} in the guide, whose rows belong to other data. Make them "
                "equal, or set up the guide again for these data."
            )


def _check_shape(name: str, role: str, node: Mapping) -> None:
    """Every batch dimension must be a plate's: others are not independent elements."""
    plates = {f.dim: f for f in node["cond_indep_stack"] if f.dim is not None}
    shape, enumerated = node["fn"].batch_shape, node["infer"].get("_dim_to_id", ())
    for dim in range(-len(shape), 0):
        expected = plates[dim].size if dim in plates else 1
        if shape[dim] != expected and dim not in enumerated:
            known = {f.name: f.size for f in plates.values() if f.name != PARTICLES}
            error = ModelError if role == "model" else GuideError
            raise error(
                f"site '{name}' has batch shape {tuple(shape)} in the {role}, but its plates are "
                f"{known or 'none'}: dimension {dim} belongs to no plate of size {shape[dim]}. A "
                "column (N, 1) needs .squeeze(-1); dimensions of one event need .to_event(...); "
                "independent elements need their own plate."
            )


def _site(name: str, p_node: dict | None, q_node: dict | None, observed: bool) -> Site:
    for role, side in (("model", p_node), ("guide", q_node)):
        if side is not None:
            _check_shape(name, role, side)
    p = None if p_node is None else density(p_node)
    q = None if q_node is None else density(q_node)
    if p is not None and q is not None and q_node is not None and q.mask is None:
        follows = q_node["infer"].get("follows_mask")
        q = replace(q, mask=mask_for_guide(name, p.fn, p.mask, follows))
    node = p_node if p_node is not None else q_node
    if node is None:
        raise ModelError(f"site '{name}' is in neither program")
    return Site(name, plates_of(node), p, q, observed)
