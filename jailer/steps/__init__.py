"""The operations that a launch is made of."""
