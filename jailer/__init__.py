"""The jailer: builds the walls of a microVM, forks its cells into them, verifies them and looks after the cells.

It knows ``ipc`` and, of the other packages, only the entry points ``vmm.main``, ``vmm.cli``,
``vcpu_worker.main`` and ``device_cell.main``.
"""
