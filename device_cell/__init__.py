"""The device cell: a process that serves virtio devices, and nothing else of the machine."""
