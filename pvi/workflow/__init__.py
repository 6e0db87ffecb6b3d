"""What is done around single fits."""

from pvi.workflow.calibration import SBC
from pvi.workflow.sbc import sbc

__all__ = ["SBC", "sbc"]
