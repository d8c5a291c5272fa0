"""The type of the formulas' arguments and results: a float of one layout, or an array of a grid of layouts."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Number: TypeAlias = float | npt.NDArray[np.float64]
