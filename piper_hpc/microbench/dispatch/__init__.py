"""Dispatch and combine, from tokens to combined tokens, timed for every all-to-all algorithm under eight loads."""
