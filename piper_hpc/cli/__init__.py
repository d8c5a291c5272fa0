"""Terminal output: progress, tables and error messages. Records and JSON documents do not pass through here."""
