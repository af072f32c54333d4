"""The host's command line, in no cell: one program, a folder for each of its commands."""
