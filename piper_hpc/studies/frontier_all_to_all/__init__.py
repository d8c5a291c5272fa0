"""Simulated Frontier: where flat, hierarchical and deduplicated all-to-alls win at the sizes of the paper's Fig 8."""
