"""For which weights a network may draw activations: those whose own draws nothing else needs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pvi.engine.local import Request, normal_of
from pvi.engine.traces import Program, hidden, is_subsample, replaced, run, sample_nodes


def local_sites(
    guide: Program, args: tuple, kwargs: Mapping, guide_trace: Any, model_trace: Any
) -> dict[str, str]:
    """How each weight that a network has asked about may be drawn: "local", "flipout", or
    "sampled: why".

    The guide must have independent normals there, and no other of its sites may depend on the
    draw: activations with a draw of their own would be independent of those sites.
    """
    how: dict[str, str] = {}
    for asked in model_trace.requests:
        how |= asked.how
    nodes = sample_nodes(guide_trace)
    for name, text in how.items():
        if text.startswith("sampled"):
            continue
        if name not in nodes:
            how[name] = "sampled: the guide has no such site"
        elif normal_of(nodes[name]["fn"]) is None:
            how[name] = f"sampled: {type(nodes[name]['fn']).__name__} in the guide"
    names = [name for name, text in how.items() if not text.startswith("sampled")]
    if names:
        for name, other in _followers(names, guide, args, kwargs, guide_trace).items():
            how[name] = f"sampled: the guide's '{other}' depends on it"
    return how


def _followers(
    names: Sequence[str], guide: Program, args: tuple, kwargs: Mapping, guide_trace: Any
) -> dict[str, str]:
    """Of these sites those whose draws another one of the guide depends on, and that one."""
    with hidden(), torch.enable_grad():
        leaves = {
            n: node["value"].detach().clone().requires_grad_(n in names)
            for n, node in guide_trace.nodes.items()
            if node["type"] == "sample" and not is_subsample(node)
        }
        again = sample_nodes(run(guide, args, kwargs, replaced(guide_trace, leaves)))
        found: dict[str, str] = {}
        for other, node in again.items():
            rest = [n for n in names if n != other and n not in found]
            log_prob = node["fn"].log_prob(leaves[other])
            if not rest or not log_prob.requires_grad:
                continue
            slopes = torch.autograd.grad(
                log_prob.sum(), [leaves[n] for n in rest], allow_unused=True
            )
            found |= {n: other for n, x in zip(rest, slopes, strict=True) if x is not None}
    return found


def described(requests: Sequence[Request], how: Mapping[str, str], instead: str) -> list[str]:
    """Lines for a table of the sites: what is drawn of each network's weights.

    Args:
        instead: why this objective gives no normals; "" if it does.
    """
    lines, groups = [], {}
    for asked in requests:
        lines += asked.notes
        for name in asked.how if asked.kind is not None else ():
            text = f"sampled: {instead}" if instead else how[name]
            groups.setdefault(text, []).append(name)
    words = {
        "local": "drawn as activations (local)",
        "flipout": "drawn with random signs (flipout)",
    }
    return [*lines, *(f"{words.get(text, text)}: {', '.join(n)}" for text, n in groups.items())]
