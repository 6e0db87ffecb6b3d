"""Guides that follow the model: one family a file, one interface."""

from pvi.guides.guide import Guide
from pvi.guides.mean_field import MeanField
from pvi.guides.prototype import prior_median

__all__ = ["Guide", "MeanField", "prior_median"]
