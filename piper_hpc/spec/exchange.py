"""What travels beside the rows of a deduplicated exchange: the same for what executes it and for what predicts it."""

from __future__ import annotations

INDEX_BYTES = 4
"""A choice's row among those of its message, int32; its expert follows from the counts."""

WEIGHT_BYTES = 4
"""A choice's weight, float32."""

METADATA_BYTES = INDEX_BYTES + WEIGHT_BYTES
"""Of each choice that shares its row with others."""
