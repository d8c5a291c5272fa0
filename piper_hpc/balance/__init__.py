"""Where experts should be: loads of ranks, planners that even them out, and whether moving pays. Torch-free."""
