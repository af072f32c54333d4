"""Device models of the controller. Every device is passive: the bus calls it, it raises interrupts by eventfd."""
