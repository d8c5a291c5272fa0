"""Views of a run's record: predicted against measured as a table, figures, and the report. Reads run folders alone."""
