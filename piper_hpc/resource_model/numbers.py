"""Numbers that the formulas take and give: one layout's, or a grid's with one dimension for each axis."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Number: TypeAlias = float | npt.NDArray[np.float64]
