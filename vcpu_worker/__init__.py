"""The vCPU worker: one process that owns a KVM VM and runs one or more of the guest's vCPUs."""
