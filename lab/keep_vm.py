"""Keeps a virtual machine with one idle vCPU open in the lab until the lab ends; says so on standard output.

KVM rewrites the kernel's code (static keys: preempt_notifier_key in the scheduler, apic_sw_disabled in KVM) when its
first VM comes, when its last one goes, and when the first vCPU has a disabled APIC. Before 8.1, QEMU's multi-threaded
software CPU may translate an instruction while another processor changes it, and keep the INT3 that stands there for
the time of the change: the processor then takes that trap, finds that it is gone, and retries it, for ever, while it
holds its run queue's lock. With a VM that is always there none of these keys changes again.
"""

from __future__ import annotations

import fcntl
import os
import signal

KVM_CREATE_VM = 0xAE01
KVM_CREATE_IRQCHIP = 0xAE60
KVM_CREATE_VCPU = 0xAE41

if __name__ == "__main__":
    vm = fcntl.ioctl(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC), KVM_CREATE_VM, 0)
    fcntl.ioctl(vm, KVM_CREATE_IRQCHIP, 0)
    vcpu = fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
    print("kept", flush=True)
    os.close(1)  # the pipe of the lab's commands: a reader of it waits for all its writers
    while True:
        signal.pause()
