"""The paper's claim side by side: what others do, what the paper does and what the planner finds, on one machine."""
