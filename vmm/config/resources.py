"""Configuration of a microVM before it is built: validated on every change, complete when the builder gets it.

A change that is refused changes nothing. Error texts are Firecracker's where clients compare them.
"""

from __future__ import annotations

import os

from base.lean_typing import TYPE_CHECKING, NamedTuple, Sequence
from ipc.launch_plan import MAX_VCPUS
from vmm import placement
from vmm.boot.cmdline import DEFAULT_COMMAND_LINE, Cmdline
from vmm.boot.errors import CmdlineError
from vmm.cli import CONSOLES, DEFAULT_PAYLOAD_LIMIT, KERNEL_ENTRIES
from vmm.config.balloon import BalloonConfig, BalloonError
from vmm.config.drives import DriveConfig, Drives
from vmm.config.entropy import EntropyConfig
from vmm.config.memory_hotplug import MemoryHotplugConfig
from vmm.config.mmds import MmdsConfig
from vmm.config.network import NetworkInterfaces
from vmm.config.pmem import PmemConfig, PmemDevices
from vmm.config.rate_limiter import TokenBucketConfig
from vmm.config.vsock import VsockConfig
from vmm.errors import VmmError
from vmm.files import FileOpenError, open_input, open_output
from vmm.mmds.store import DataStore
from vmm.placement import ANY, Affinity, AffinityError, PlacementError, parse_affinity

if TYPE_CHECKING:
    from base.lean_typing import Iterator
    from vmm.cli import CommandLine
    from vmm.cpu_config.template import CustomCpuTemplate
    from vmm.json.text import JsonValue

DEFAULT_MEM_SIZE_MIB = 128

HUGE_PAGES_NONE = "None"
HUGE_PAGES_TRANSPARENT = "Transparent"
HUGE_PAGES_2M = "2M"
HUGE_PAGES = (HUGE_PAGES_NONE, HUGE_PAGES_TRANSPARENT, HUGE_PAGES_2M)
NO_CPU_TEMPLATE = "None"
#: Static CPU templates that exist on x86-64.
CPU_TEMPLATES = ("C3", "T2", "T2S", NO_CPU_TEMPLATE, "T2CL", "T2A")


class MachineConfigError(VmmError):
    """PUT or PATCH /machine-config is refused."""

    code = "vmm.machine_config"


class BootSourceError(VmmError):
    """PUT /boot-source is refused."""

    code = "vmm.boot_source"


#: What the reboot of a guest does: the microVM ends, as with Firecracker, or its machine starts anew.
REBOOT_EXIT = "Exit"
REBOOT_RESTART = "Restart"
REBOOT_ACTIONS = (REBOOT_EXIT, REBOOT_RESTART)


class SerialError(VmmError):
    """The file for the serial console cannot be opened."""

    code = "vmm.serial"


class StartError(VmmError):
    """The configuration cannot be started, whatever the host has."""

    code = "vmm.start"


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
        )

    def to_json(self) -> dict[str, JsonValue]:
        """Return what GET /machine-config shows: CPU template and what is ours only if they were set."""
        template: dict[str, JsonValue] = {} if self.cpu_template is None else {"cpu_template": self.cpu_template}
        placed: dict[str, JsonValue] = {} if self.vcpu_placement is None else {"vcpu_placement": self.vcpu_placement}
        affinity: dict[str, JsonValue] = {} if self.vcpu_affinity is None else {"vcpu_affinity": self.vcpu_affinity}
        reboot: dict[str, JsonValue] = {} if self.reboot_action is None else {"reboot_action": self.reboot_action}
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
        }


class BootSourceConfig(NamedTuple):
    """Body of PUT /boot-source. Without ``boot_args`` the default command line is used."""

    kernel_image_path: str
    initrd_path: str | None = None
    boot_args: str | None = None

    def to_json(self) -> dict[str, JsonValue]:
        """Return the ``boot-source`` section of GET /vm/config."""
        return {
            "kernel_image_path": self.kernel_image_path,
            "initrd_path": self.initrd_path,
            "boot_args": self.boot_args,
        }


class BootSource:
    """A boot source whose files are open: what was there at the time of the request is what will be booted.

    ``kernel_fd`` and ``initrd_fd`` (-1: no initrd) are positioned at 0 and read with pread by the builder, so that a
    start that failed can be repeated. ``command_line`` is the client's, or the default, without additions.
    """

    __slots__ = ("config", "kernel_fd", "initrd_fd", "command_line")

    def __init__(self, config: BootSourceConfig) -> None:
        """Check the command line and open the files. Raises BootSourceError."""
        self.config = config
        self.kernel_fd = -1
        self.initrd_fd = -1
        try:
            self.kernel_fd = open_input(config.kernel_image_path)
        except FileOpenError as error:
            raise BootSourceError(f"The kernel file cannot be opened: {error}") from error
        try:
            if config.initrd_path is not None:
                self.initrd_fd = open_input(config.initrd_path)
            self.command_line = checked_command_line(config.boot_args)
        except FileOpenError as error:
            self.close_files()
            raise BootSourceError(
                f"The initrd file cannot be opened due to invalid path or invalid permissions. {error}"
            ) from error
        except BootSourceError:
            self.close_files()
            raise

    def close_files(self) -> None:
        """Close the descriptors. Idempotent."""
        for fd in (self.kernel_fd, self.initrd_fd):
            if fd >= 0:
                os.close(fd)
        self.kernel_fd = self.initrd_fd = -1


def checked_command_line(boot_args: str | None) -> str:
    """Return the command line for ``boot_args``. Raises BootSourceError if the builder could not use it."""
    try:
        Cmdline(boot_args)
    except CmdlineError as error:
        raise BootSourceError(f"The kernel command line is invalid: {error}") from error
    return DEFAULT_COMMAND_LINE if boot_args is None else boot_args


class SerialConfig(NamedTuple):
    """Body of PUT /serial: where the guest's console goes, and how fast it may write (tokens are bytes)."""

    serial_out_path: str | None = None
    rate_limiter: TokenBucketConfig | None = None


class StartOptions(NamedTuple):
    """What the command line adds to the configuration; the API does not change it.

    ``kernel_entry`` and ``console`` are choices of ``vmm.cli``; ``kernel_cache_fd`` is a directory descriptor, or -1.
    """

    boot_timer: bool = False
    unpack_kernel: bool = True
    kernel_cache_fd: int = -1
    kernel_entry: str = KERNEL_ENTRIES[0]
    console: str = CONSOLES[0]
    exerciser: bool = False
    #: Bytes of the metadata service's content.
    mmds_size_limit: int = DEFAULT_PAYLOAD_LIMIT
    #: The host's CPUs that this process may use, in ascending order; empty: not known.
    host_cpus: tuple[int, ...] = ()

    @staticmethod
    def of(line: CommandLine, kernel_cache_fd: int, host_cpus: tuple[int, ...] = ()) -> StartOptions:
        """Return what a command line asks for."""
        return StartOptions(
            line.boot_timer,
            line.unpack_kernel,
            kernel_cache_fd,
            line.kernel_entry,
            line.console,
            line.exerciser,
            line.mmds_size_limit,
            host_cpus,
        )


class VmResources:
    """Everything that is configured before the start. One per process; survives starts that fail."""

    def __init__(self, options: StartOptions | None = None) -> None:
        self.options = options or StartOptions()
        self.machine_config = MachineConfig()
        self.boot_source: BootSource | None = None
        self.serial = SerialConfig()
        self.drives = Drives()
        self.pmem = PmemDevices()
        self.network_interfaces = NetworkInterfaces()
        self.vsock: VsockConfig | None = None
        self.balloon: BalloonConfig | None = None
        self.entropy: EntropyConfig | None = None
        self.memory_hotplug: MemoryHotplugConfig | None = None
        self.mmds_config: MmdsConfig | None = None
        #: Content of the metadata service.
        self.mmds = DataStore(self.options.mmds_size_limit)
        #: Of a custom and a static CPU template (in ``machine_config``) the one that was set last counts.
        self.cpu_template: CustomCpuTemplate | None = None

    def update_machine_config(self, update: MachineConfigUpdate) -> None:
        """Change the machine configuration. Raises MachineConfigError."""
        updated = self.machine_config.updated(update, self.options.host_cpus)
        if self.balloon is not None and updated.mem_size_mib < self.balloon.amount_mib:
            raise MachineConfigError(
                "The memory size (MiB) is smaller than the previously set balloon device target size."
            )
        if update.cpu_template is not None:
            self.cpu_template = None
        self.machine_config = updated

    def set_cpu_template(self, template: CustomCpuTemplate) -> None:
        """Set a custom CPU template, which replaces a static one."""
        self.cpu_template = template
        self.machine_config = self.machine_config._replace(cpu_template=None)

    def insert_drive(self, config: DriveConfig) -> None:
        """Add or replace a block device. Raises DriveError."""
        self.drives.insert(config, pmem_root=self.pmem.has_root)

    def insert_pmem(self, config: PmemConfig) -> None:
        """Add or replace a pmem device. Raises PmemError."""
        self.pmem.insert(config, block_root=self.drives.has_root)

    def set_vsock(self, config: VsockConfig) -> None:
        """Set or replace the vsock device. Raises VsockError."""
        config.check()
        self.vsock = config

    def set_entropy(self, config: EntropyConfig) -> None:
        """Set or replace the entropy device."""
        self.entropy = config

    def set_balloon(self, config: BalloonConfig) -> None:
        """Set or replace the balloon. Raises BalloonError."""
        config.check(self.machine_config.mem_size_mib)
        self.balloon = config

    def require_balloon(self) -> BalloonConfig:
        """Return the balloon's configuration. Raises BalloonError if there is none."""
        if self.balloon is None:
            raise BalloonError("No balloon device found.")
        return self.balloon

    def set_memory_hotplug(self, config: MemoryHotplugConfig) -> None:
        """Set or replace the memory hot-plug device. Raises MemoryHotplugError."""
        config.check()
        self.memory_hotplug = config

    def set_mmds_config(self, config: MmdsConfig) -> None:
        """Configure the metadata service. Raises MmdsConfigError."""
        config.check(self._interface_ids())
        self.mmds_config = config

    def _interface_ids(self) -> list[str]:
        return [interface.iface_id for interface in self.network_interfaces.configs]

    def set_boot_source(self, config: BootSourceConfig) -> None:
        """Replace the boot source. Raises BootSourceError, and then the one before stays."""
        boot_source = BootSource(config)
        if self.boot_source is not None:
            self.boot_source.close_files()
        self.boot_source = boot_source

    def set_serial(self, config: SerialConfig) -> None:
        """Replace the configuration of the serial console; its file is opened at the start."""
        self.serial = config

    def open_serial_output(self) -> int:
        """Open ``serial_out_path`` and return a non-blocking descriptor, or -1 if none is set. Raises SerialError."""
        if self.serial.serial_out_path is None:
            return -1
        try:
            return open_output(self.serial.serial_out_path)
        except FileOpenError as error:
            raise SerialError(f"Failed to open the serial output file: {error}") from error

    def require_boot_source(self) -> BootSource:
        """Return the boot source with its files open. Raises StartError if none is configured."""
        if self.boot_source is None:
            raise StartError("Cannot start microvm without kernel configuration.")
        return self.boot_source

    def check_startable(self) -> None:
        """Raise StartError if the configuration lacks something, or has something that cannot be started yet."""
        self.require_boot_source()
        machine = self.machine_config
        if machine.huge_pages != HUGE_PAGES_NONE:
            raise StartError(f"Huge pages are not yet supported: huge_pages is {machine.huge_pages}.")
        for feature in self._unsupported():
            raise StartError(f"{feature} is not yet supported.")

    def _unsupported(self) -> Iterator[str]:
        """Name what is configured and cannot be started yet."""
        for drive in self.drives.configs:
            yield f"The block device {drive.drive_id}"
        for pmem in self.pmem.configs:
            yield f"The pmem device {pmem.id}"
        for interface in self.network_interfaces.configs:
            yield f"The network interface {interface.iface_id}"
        for config, name in (
            (self.vsock, "The vsock device"),
            (self.balloon, "The balloon device"),
            (self.entropy, "The entropy device"),
            (self.memory_hotplug, "The memory hot-plug device"),
        ):
            if config is not None:
                yield name

    def to_json(self) -> dict[str, JsonValue]:
        """Return what GET /vm/config shows: every section, whatever is configured."""
        boot_source = BootSourceConfig("") if self.boot_source is None else self.boot_source.config
        interfaces = self.network_interfaces.configs
        return {
            "balloon": None if self.balloon is None else self.balloon.to_json(),
            "drives": [drive.to_json() for drive in self.drives.configs],
            "boot-source": boot_source.to_json(),
            "cpu-config": None,
            "logger": None,
            "machine-config": self.machine_config.to_json(),
            "metrics": None,
            "mmds-config": None if self.mmds_config is None else self.mmds_config.to_json(self._interface_ids()),
            "network-interfaces": [interface.to_json() for interface in interfaces],
            "vsock": None if self.vsock is None else self.vsock.to_json(),
            "entropy": None if self.entropy is None else self.entropy.to_json(),
            "pmem": [pmem.to_json() for pmem in self.pmem.configs],
            "memory-hotplug": None if self.memory_hotplug is None else self.memory_hotplug.to_json(),
        }

    def started(self) -> None:
        """The microVM has started: close what it needs no more. One that restarts needs its kernel again."""
        if not self.machine_config.restarts:
            self.close()

    def close(self) -> None:
        """Close the files that are held open for the start."""
        if self.boot_source is not None:
            self.boot_source.close_files()
