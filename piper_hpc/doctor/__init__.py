"""What of a machine will not work, and how to mend it, before a job finds out."""
