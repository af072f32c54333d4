"""The state of a microVM as bytes."""
