"""Ghosts: the guest's other vCPUs, as this worker's VM has them.

A guest with N vCPUs runs in several KVM VMs over the same memory. Each VM has every vCPU of the guest; those that
another worker runs are ghosts here. What a vCPU of this VM sends to one of them (IPI, INIT, SIPI, NMI) the kernel
delivers to the ghost, and the ghost passes it on to the worker that runs the real one: within the kernel after the
first time (OUT → ioeventfd → eventfd → irqfd in the other VM), by way of the controller before.
"""
