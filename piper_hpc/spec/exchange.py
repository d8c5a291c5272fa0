"""What travels beside the rows of a deduplicated exchange: the same for what executes it and for what predicts it."""

from __future__ import annotations

INDEX_BYTES = 4
"""A choice's row among those of its message, int32; its expert follows from the counts."""

WEIGHT_BYTES = 4
"""A choice's weight, float32."""

LEVELS = ("node", "rack", "system")
"""Links by what they join: ranks of a node, nodes of a rack, racks."""

MOVES_PER_STEP = 4
"""Times that a plan is carried out in a step of training: dispatch and combine, forward and backward."""

METADATA_BYTES = INDEX_BYTES + WEIGHT_BYTES
"""Of each choice that shares its row with others."""
