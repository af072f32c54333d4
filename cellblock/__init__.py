"""Programs for the host, in no cell."""
