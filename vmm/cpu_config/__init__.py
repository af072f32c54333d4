"""CPU templates: what a client may change of the CPU that a guest sees."""
