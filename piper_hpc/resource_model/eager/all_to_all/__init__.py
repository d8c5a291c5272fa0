"""All-to-all algorithms on this project's executor: seconds from fitted constants, and the selection of `auto`."""

from piper_hpc.resource_model.eager.all_to_all.cost_terms import CostTerms, cost_terms
from piper_hpc.resource_model.eager.all_to_all.fit import LEAST_ROWS, Judgement, fit_all_to_all_model, judge
from piper_hpc.resource_model.eager.all_to_all.model import AllToAllModel, of_links
from piper_hpc.resource_model.eager.all_to_all.selection import Selection, select_by_model, select_measured

__all__ = [
    "LEAST_ROWS",
    "AllToAllModel",
    "CostTerms",
    "Judgement",
    "Selection",
    "cost_terms",
    "fit_all_to_all_model",
    "judge",
    "of_links",
    "select_by_model",
    "select_measured",
]
