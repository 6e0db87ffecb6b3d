"""Which elements of a latent site count."""

from typing import Any

import torch
from pyro.distributions.torch_distribution import MaskedDistribution

from pvi.errors import GuideError


def mask_for_guide(name: str, fn: Any, mask: Any, follows: bool | None) -> Any:
    """What a guide without a mask leaves out of a site: the entropy of entries that the model masks
    out has no limit.

    Args:
        fn, mask: the model's distribution, which may have a mask of its own, and the mask around.
        follows: whether the guide's site takes the model's mask; `False` where it can't; `None` for
            guides of Pyro and by hand, whose mask is their own.

    Raises:
        GuideError: it can't, and must.
    """
    if follows is not None and isinstance(fn, MaskedDistribution):
        own = torch.as_tensor(fn._mask)
        mask = own if mask is None else own & torch.as_tensor(mask, device=own.device)
    if follows is False and not (mask is None or mask is True or bool(torch.as_tensor(mask).all())):
        raise GuideError(
            f"the model masks elements of site '{name}' out, but the guide has one joint density "
            "over all of them, which can't leave some out. Use another of pvi.guides for this "
            "site, such as Structured (others for the rest: Group)."
        )
    of_obs_mask = name.endswith("_unobserved")  # entries that are observed use no draw
    return mask if follows or of_obs_mask else None
