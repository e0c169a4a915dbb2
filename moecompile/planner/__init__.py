"""Builds plans and estimates traffic, parameters and memory, from `moecompile.plan` and without torch."""

from moecompile.planner.estimate import estimate
from moecompile.planner.params import ModelFacts, RunFacts
from moecompile.planner.traffic import (
    Copies,
    Links,
    Wire,
    choose_dispatch,
    copies_per_token,
    forward_traffic,
)

__all__ = [
    "Copies",
    "Links",
    "ModelFacts",
    "RunFacts",
    "Wire",
    "choose_dispatch",
    "copies_per_token",
    "estimate",
    "forward_traffic",
]
