"""What is done with fits: calibrate, compare, hold against Markov chains, escalate to these."""

from pvi.workflow.against import Against, against
from pvi.workflow.calibration import SBC
from pvi.workflow.compare import Comparison, compare
from pvi.workflow.nuts import Chains, nuts
from pvi.workflow.sbc import sbc

__all__ = ["SBC", "Against", "Chains", "Comparison", "against", "compare", "nuts", "sbc"]
