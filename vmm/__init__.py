"""The VMM controller: one process per microVM that owns the machine model and serves the API."""
