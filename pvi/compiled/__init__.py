"""Steps of a fit as graphs of tensor operations, captured from Pyro programs as they are."""

from pvi.compiled.backend import make_function
from pvi.compiled.block import SHARE, STEPS, Adam, Block, State
from pvi.compiled.errors import NotCompilable
from pvi.compiled.module import CompiledLoss, compile
from pvi.compiled.unit import Source, Unit, buffers, check, live, make_unit, signature
