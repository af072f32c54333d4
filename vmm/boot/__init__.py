"""Kernel loading and the guest's boot environment: pure code over guest memory, without KVM and without processes."""
