"""What the controller tells of itself: log, metrics, events."""
