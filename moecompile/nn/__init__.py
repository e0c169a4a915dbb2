"""Router, balance and experts: plain modules that know nothing of the compiler."""

from moecompile.nn.balance import LayerLoad, routers_of, update_balance
from moecompile.nn.experts import Experts, SharedExperts
from moecompile.nn.router import Router

__all__ = ["Experts", "LayerLoad", "Router", "SharedExperts", "routers_of", "update_balance"]
