"""How much of the exchange of routed rows shared experts hide, on the testbed."""
