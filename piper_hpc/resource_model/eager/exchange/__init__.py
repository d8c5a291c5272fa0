"""The all-to-all family on this project's executor: its seconds from fitted constants, and the choice of `auto`."""

from piper_hpc.resource_model.eager.exchange.choice import Choice, Way, cheapest, choose
from piper_hpc.resource_model.eager.exchange.demand import Demand, demand
from piper_hpc.resource_model.eager.exchange.fit import LEAST_ROWS, Judgement, fit_exchange_model, judge
from piper_hpc.resource_model.eager.exchange.model import ExchangeModel, of_links

__all__ = [
    "LEAST_ROWS",
    "Choice",
    "Demand",
    "ExchangeModel",
    "Judgement",
    "Way",
    "cheapest",
    "choose",
    "demand",
    "fit_exchange_model",
    "judge",
    "of_links",
]
