"""The lab: a machine emulated by QEMU's software CPU, in which KVM has hardware second-stage paging.

A stock Debian kernel runs in it with the host's root file system, so that a command behaves as on this host, but with
a kvm_amd that pages in hardware, cgroup v2 only, and every capability (docs/lab.md).
"""
