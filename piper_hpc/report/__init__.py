"""Views of a run's record: predicted against measured, as a table, as figures, and as the report beside the record.

load.py finds a run and its steady steps, table.py puts every term beside what was predicted, all_to_all.py what each
level of the network carried; figures.py and facts.py make the parts of the page that write.py writes, and nccl_tests.py
exports measurements as nccl-tests' JSON. It reads run folders alone: what started or measured a run is unknown here.
"""
