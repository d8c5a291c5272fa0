"""Cases that arithmetic alone decides, each beside what its source says: `python -m analysis.validate exact`."""

from analysis.validation.exact.cases import Case, cases

__all__ = ["Case", "cases"]
