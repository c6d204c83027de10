"""What a step is and how it runs: parameters, context, executors, resume."""

from halfmap.engine.context import Context, Failure
from halfmap.engine.options import RunOptions
from halfmap.engine.parameters import Input, Param
from halfmap.engine.step import Out, Step, parse_step, registered_steps

__all__ = [
    "Context",
    "Failure",
    "Input",
    "Out",
    "Param",
    "RunOptions",
    "Step",
    "parse_step",
    "registered_steps",
]
