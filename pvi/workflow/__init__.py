"""What is done with fits: compare them, hold them against Markov chains, escalate to these."""

from pvi.workflow.against import Against, against
from pvi.workflow.compare import Comparison, compare
from pvi.workflow.nuts import Chains, nuts

__all__ = ["Against", "Chains", "Comparison", "against", "compare", "nuts"]
