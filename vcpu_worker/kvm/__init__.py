"""KVM as the kernel's API documents it: numbers and layouts (``abi``), and thin wrappers without cleverness.

Source of every number and layout: ``linux/kvm.h`` and ``asm/kvm.h`` of the kernel's user-space API, and
Documentation/virt/kvm/api.rst. tests/unit/vcpu_worker/kvm/test_abi.py compiles them against the installed headers.
"""
