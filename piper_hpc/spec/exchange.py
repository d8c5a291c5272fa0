"""What travels beside the rows of a deduplicated exchange: the same for what executes it and for what predicts it."""

from __future__ import annotations

ALGORITHMS = ("flat", "halo", "halo3", "flat_dedup", "halo_dedup", "halo3_dedup")
"""What Layout.all_to_all may name, beside `auto`."""

AUTO = "auto"
"""What the measured cluster, or else the cost model, finds fastest for the group, size, top_k and load."""

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
