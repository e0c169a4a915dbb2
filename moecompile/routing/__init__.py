"""The router's config as plain data: enums, options and their rules, and which modules are a router's (own.py). No
torch, no mesh.

Configs are resolved into it, plans contain it and `nn.Router` takes it (docs/decisions/0013).
"""

from moecompile.routing.choices import BalanceRule, BiasUpdate, Choice, DropPolicy, GroupScore, Workload
from moecompile.routing.config import (
    AUTO_LOSSES,
    BALANCE_NUMBERS,
    BINS,
    LOAD_LOSSES,
    LOSSES,
    NO_BALANCE,
    OWN_LOSSES,
    ROUTER_NUMBERS,
    BalanceSpec,
    RouterConfig,
    check_balance,
)
from moecompile.routing.own import is_of_router

__all__ = [
    "AUTO_LOSSES",
    "BALANCE_NUMBERS",
    "BINS",
    "LOAD_LOSSES",
    "LOSSES",
    "NO_BALANCE",
    "OWN_LOSSES",
    "ROUTER_NUMBERS",
    "BalanceRule",
    "BalanceSpec",
    "BiasUpdate",
    "Choice",
    "DropPolicy",
    "GroupScore",
    "RouterConfig",
    "Workload",
    "check_balance",
    "is_of_router",
]
