"""The program ``cpu-template`` (also ``cpu-template-helper``): makes, compares and checks CPU templates."""
