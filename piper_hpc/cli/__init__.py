"""What a person at a terminal sees: progress, tables, errors. Records and JSON stay free of it."""
