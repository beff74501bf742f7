"""Traces for the tests of the cross-checker: of small models, in any profile, right or wrong."""

import dataclasses
import inspect

import numpy as np

from llama3np import model as spec
from llama3np.crosscheck import measure
from llama3np.crosscheck.taps import FORMAT, Trace
from llama3np.llm import Llama


def forward(config, params, ids, profile="float64", ops=None):
    """Every tap of one sequence, without the B axis."""
    llm = Llama(config, params, dtype=profile, engine="numpy")
    if ops:
        llm.engine.ops = ops
    taps = {}
    with np.errstate(all="ignore"):
        llm.forward([ids], tap=lambda name, array: taps.__setitem__(name, np.array(array[0])))
    return taps
