"""The device cell: one process in which virtio devices run, without a virtual machine, a file system or a network."""
