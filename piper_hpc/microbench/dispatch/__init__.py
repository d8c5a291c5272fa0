"""The whole way of tokens to their experts and back, timed for every algorithm of the family under eight loads."""
