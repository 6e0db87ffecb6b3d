"""The exceptions that pvi raises: each says what was expected, what came, and what to change."""


class PviError(ValueError):
    """Base class of all errors raised by pvi on bad input."""


class DataError(PviError):
    """The data cannot be used: missing values, mismatched lengths, no rows."""


class ModelError(PviError):
    """The model cannot be fitted: duplicate sites, no observations, broken minibatches."""


class GuideError(PviError):
    """The guide does not match the model: a site is missing, extra, or has the wrong support."""


class ObjectiveError(PviError):
    """The objective does not apply to this model and guide, or its options contradict."""


class FitError(PviError):
    """An option of the fit is wrong, or the optimisation can't go on: a loss that is not finite."""


class CheckpointError(PviError):
    """A saved fit or a checkpoint is damaged, or belongs to another model, guide or data."""
