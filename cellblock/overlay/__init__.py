"""``cellblock overlay``: make overlays of drives, look into them, commit and rebase them (docs/overlays.md)."""
