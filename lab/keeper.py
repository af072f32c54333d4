"""What the lab keeps doing until it ends, so that QEMU's software CPU serves it: one idle VM, and wake-ups.

A VM. KVM rewrites the kernel's code (static keys: preempt_notifier_key in the scheduler, apic_sw_disabled in KVM) when
its first VM comes, when its last one goes, and when the first vCPU has a disabled APIC. Before 8.1, QEMU's software CPU
with several threads may translate an instruction while another processor changes it, and keep the INT3 that stands
there for the time of the change: the processor then takes that trap, finds that it is gone, and retries it, for ever,
while it holds its run queue's lock. With a VM that is always there none of these keys changes again.

Wake-ups. QEMU keeps in one word which kinds of interrupts a processor has pending, and VMRUN changes it without the
lock that others take: the request of a timer may be lost, and a processor that sleeps then stays asleep until its next
interrupt comes. So one process, on the first processor (where no guest runs), wakes one on each of the others all the
time, which the kernel does by an interrupt.

Says on standard output when all of it is there.
"""

from __future__ import annotations

import fcntl
import os
import time

KVM_CREATE_VM = 0xAE01
KVM_CREATE_IRQCHIP = 0xAE60
KVM_CREATE_VCPU = 0xAE41

WAKE_UP_PERIOD_S = 0.5


def keep_vm() -> int:
    """Make a VM with an idle vCPU; return a descriptor that has to stay open. Raises OSError."""
    vm = fcntl.ioctl(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC), KVM_CREATE_VM, 0)
    fcntl.ioctl(vm, KVM_CREATE_IRQCHIP, 0)
    return fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)


def sleeper(processor: int) -> int:
    """Fork a process that sleeps on this processor; return the descriptor that wakes it. Raises OSError."""
    read_end, write_end = os.pipe()
    if not os.fork():
        for each in (1, write_end):
            os.close(each)
        os.sched_setaffinity(0, {processor})
        while os.read(read_end, 1):
            pass
        os._exit(0)
    os.close(read_end)
    return write_end


def main() -> None:
    """Keep all of it; does not return."""
    keep_vm()
    sleepers = [sleeper(processor) for processor in range(1, os.cpu_count() or 1)]
    os.sched_setaffinity(0, {0})
    print("kept", flush=True)
    os.close(1)  # the pipe of the lab's commands: a reader of it waits for all its writers
    while True:
        time.sleep(WAKE_UP_PERIOD_S)
        for each in sleepers:
            os.write(each, b"\0")


if __name__ == "__main__":
    main()
