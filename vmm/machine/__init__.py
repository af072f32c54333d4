"""The running microVM as one object: its operations, how it is built, how it ends."""
