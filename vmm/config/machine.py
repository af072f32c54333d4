"""vCPUs, memory and CPU template of the microVM: PUT and PATCH /machine-config."""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, NamedTuple, Sequence
from ipc.launch_plan import MAX_VCPUS
from vmm import placement
from vmm.errors import VmmError
from vmm.json.schema import BOOLEAN, STRING, U8, USIZE, Field, Object, Option, Variant
from vmm.placement import ANY, Affinity, AffinityError, PlacementError, parse_affinity

if TYPE_CHECKING:
    from vmm.json.text import JsonValue

DEFAULT_MEM_SIZE_MIB = 128

HUGE_PAGES_NONE = "None"
HUGE_PAGES_TRANSPARENT = "Transparent"
HUGE_PAGES_2M = "2M"
HUGE_PAGES = (HUGE_PAGES_NONE, HUGE_PAGES_TRANSPARENT, HUGE_PAGES_2M)
NO_CPU_TEMPLATE = "None"
#: Static CPU templates that exist on x86-64.
CPU_TEMPLATES = ("C3", "T2", "T2S", NO_CPU_TEMPLATE, "T2CL", "T2A")
#: What the reboot of a guest does: the microVM ends, as with Firecracker, or its machine starts anew.
REBOOT_EXIT = "Exit"
REBOOT_RESTART = "Restart"
REBOOT_ACTIONS = (REBOOT_EXIT, REBOOT_RESTART)


#: How the virtio devices are spread over cells: all in one, or one for each.
DEVICE_CELLS_ONE = "one"
DEVICE_CELLS_EACH = "each"
DEVICE_CELLS = (DEVICE_CELLS_ONE, DEVICE_CELLS_EACH)


class MachineConfigError(VmmError):
    """PUT or PATCH /machine-config is refused."""

    code = "vmm.machine_config"


class MachineConfigUpdate(NamedTuple):
    """Changes of the machine configuration; None leaves a value as it is. ``mem_size_mib`` is in MiB."""

    vcpu_count: int | None = None
    mem_size_mib: int | None = None
    smt: bool | None = None
    cpu_template: str | None = None
    track_dirty_pages: bool | None = None
    huge_pages: str | None = None
    vcpu_placement: str | None = None
    reboot_action: str | None = None
    vcpu_affinity: str | None = None
    device_cells: str | None = None


class MachineConfig(NamedTuple):
    """vCPUs and memory of the microVM. ``cpu_template`` is None or the name of a static template."""

    vcpu_count: int = 1
    mem_size_mib: int = DEFAULT_MEM_SIZE_MIB
    smt: bool = False
    cpu_template: str | None = None
    track_dirty_pages: bool = False
    huge_pages: str = HUGE_PAGES_NONE
    vcpu_placement: str | None = None
    reboot_action: str | None = None
    vcpu_affinity: str | None = None
    device_cells: str | None = None

    @property
    def affinity(self) -> Affinity:
        """The host CPUs of each vCPU; nothing if they may use all that the microVM may."""
        return parse_affinity(self.vcpu_affinity, self.vcpu_count)

    @property
    def restarts(self) -> bool:
        """Whether a guest that reboots gets a machine that starts anew, in the place of the end."""
        return self.reboot_action == REBOOT_RESTART

    @property
    def mem_size_bytes(self) -> int:
        """Size of guest memory in bytes."""
        return self.mem_size_mib << 20

    def updated(self, update: MachineConfigUpdate, host_cpus: Sequence[int] = ()) -> MachineConfig:
        """Return the configuration after a change. Raises MachineConfigError.

        ``host_cpus`` are the host's CPUs that may be used, in ascending order; empty: any.
        """
        vcpu_count = self.vcpu_count if update.vcpu_count is None else update.vcpu_count
        smt = self.smt if update.smt is None else update.smt
        if not 0 < vcpu_count <= MAX_VCPUS or (smt and vcpu_count > 1 and vcpu_count % 2):
            raise MachineConfigError(
                f"The number of vCPUs must be greater than 0, less than {MAX_VCPUS} and must be 1 or an even "
                "number if SMT is enabled."
            )
        mem_size_mib = self.mem_size_mib if update.mem_size_mib is None else update.mem_size_mib
        huge_pages = self.huge_pages if update.huge_pages is None else update.huge_pages
        if not mem_size_mib or (huge_pages != HUGE_PAGES_NONE and mem_size_mib % 2):
            raise MachineConfigError(
                "The memory size (MiB) is either 0, or not a multiple of the configured page size."
            )
        placed = self.vcpu_placement if update.vcpu_placement is None else update.vcpu_placement
        affinity = self.vcpu_affinity if update.vcpu_affinity is None else update.vcpu_affinity
        try:
            if placed is not None:
                placement.check(placed, vcpu_count)
            parse_affinity(affinity, vcpu_count, host_cpus)
        except (PlacementError, AffinityError) as error:
            raise MachineConfigError(str(error)) from None
        template = self.cpu_template if update.cpu_template is None else update.cpu_template
        return MachineConfig(
            vcpu_count,
            mem_size_mib,
            smt,
            None if template == NO_CPU_TEMPLATE else template,
            self.track_dirty_pages if update.track_dirty_pages is None else update.track_dirty_pages,
            huge_pages,
            placed,
            self.reboot_action if update.reboot_action is None else update.reboot_action,
            None if affinity == ANY else affinity,
            self.device_cells if update.device_cells is None else update.device_cells,
        )

    def to_json(self) -> dict[str, JsonValue]:
        """Return what GET /machine-config shows: CPU template and what is ours only if they were set."""
        template: dict[str, JsonValue] = {} if self.cpu_template is None else {"cpu_template": self.cpu_template}
        placed: dict[str, JsonValue] = {} if self.vcpu_placement is None else {"vcpu_placement": self.vcpu_placement}
        affinity: dict[str, JsonValue] = {} if self.vcpu_affinity is None else {"vcpu_affinity": self.vcpu_affinity}
        reboot: dict[str, JsonValue] = {} if self.reboot_action is None else {"reboot_action": self.reboot_action}
        cells: dict[str, JsonValue] = {} if self.device_cells is None else {"device_cells": self.device_cells}
        return {
            "vcpu_count": self.vcpu_count,
            "mem_size_mib": self.mem_size_mib,
            "smt": self.smt,
            **template,
            "track_dirty_pages": self.track_dirty_pages,
            "huge_pages": self.huge_pages,
            **placed,
            **reboot,
            **affinity,
            **cells,
        }


_CPU_TEMPLATE = Variant(*CPU_TEMPLATES)
_HUGE_PAGES = Variant(*HUGE_PAGES)
_REBOOT_ACTION = Variant(*REBOOT_ACTIONS)
_DEVICE_CELLS = Variant(*DEVICE_CELLS)
MACHINE_CONFIG = Object(
    "MachineConfig",
    MachineConfigUpdate,
    Field("vcpu_count", U8),
    Field("mem_size_mib", USIZE),
    Field("smt", BOOLEAN, False),
    Field("cpu_template", Option(_CPU_TEMPLATE), None),
    Field("track_dirty_pages", BOOLEAN, False),
    Field("huge_pages", _HUGE_PAGES, HUGE_PAGES_NONE),
    Field("vcpu_placement", Option(STRING), extension=True),
    Field("reboot_action", Option(_REBOOT_ACTION), extension=True),
    Field("vcpu_affinity", Option(STRING), extension=True),
    Field("device_cells", Option(_DEVICE_CELLS), extension=True),
)
MACHINE_CONFIG_UPDATE = Object(
    "MachineConfigUpdate",
    MachineConfigUpdate,
    Field("vcpu_count", Option(U8), None),
    Field("mem_size_mib", Option(USIZE), None),
    Field("smt", Option(BOOLEAN), None),
    Field("cpu_template", Option(_CPU_TEMPLATE), None),
    Field("track_dirty_pages", Option(BOOLEAN), None),
    Field("huge_pages", Option(_HUGE_PAGES), None),
    Field("vcpu_placement", Option(STRING), extension=True),
    Field("reboot_action", Option(_REBOOT_ACTION), extension=True),
    Field("vcpu_affinity", Option(STRING), extension=True),
    Field("device_cells", Option(_DEVICE_CELLS), extension=True),
)
