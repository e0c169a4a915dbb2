"""Router, load balance and experts: plain modules that do not depend on the compiler."""

from moecompile.nn.balance import (
    LayerLoad,
    auxiliary_loss,
    auxiliary_losses,
    forget_auxiliary_losses,
    meters_of,
    update_balance,
)
from moecompile.nn.experts import Experts, SharedExperts
from moecompile.nn.latent import Latent, LatentDown, LatentUp
from moecompile.nn.meter import LoadMeter
from moecompile.nn.router import Router, routers_of, set_random_key

__all__ = [
    "Experts",
    "Latent",
    "LatentDown",
    "LatentUp",
    "LayerLoad",
    "LoadMeter",
    "Router",
    "SharedExperts",
    "auxiliary_loss",
    "auxiliary_losses",
    "forget_auxiliary_losses",
    "meters_of",
    "routers_of",
    "set_random_key",
    "update_balance",
]
