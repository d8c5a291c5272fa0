"""Prediction against record: reads run folders, never a live process. Tables, figures, report, and exit codes."""
