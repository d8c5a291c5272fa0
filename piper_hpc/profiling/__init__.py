"""When things happened on one rank: clocks, spans of named regions, memory peaks, and traces of them."""
