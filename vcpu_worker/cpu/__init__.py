"""What the guest sees of its CPU: CPUID, model specific registers, boot registers. Pure functions on values."""
