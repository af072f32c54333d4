"""Transports: how a driver reaches a virtio device, by registers, doorbells and interrupts."""
