"""``cellblock cpu-template``, also called ``cpu-template-helper``: makes, compares and checks CPU templates."""
