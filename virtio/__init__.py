"""virtio devices and their queues: no transport, no KVM, no API, no process."""
