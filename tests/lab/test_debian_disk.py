"""An unmodified Debian root file system on a drive: to the login prompt, worked on, off, and clean from outside."""

from __future__ import annotations

import re

import pytest

from lab.guest_disk import digest_of
from tests.harness.debian import COMPLAINTS
from tests.harness.debian_disk import debian, file_system_is_clean, folder_of_disks, shown_in
from tests.harness.run_options import SOAK

SOAK_ONLY = pytest.mark.soak("block", only=True)
#: What apt does to a disk: files laid down beside the old ones, each synced and renamed; a database rewritten. Those of
#: tzdata are thousands, for which the lab takes minutes.
PACKAGES = (
    f"dpkg -i /srv/packages/{'tzdata' if SOAK else 'e2fsprogs'}_*.deb && "
    "apt-get -q -y install /srv/packages/hello_*.deb"
)


@pytest.mark.timeout(900)
@pytest.mark.soak("block")
@pytest.mark.parametrize(
    ("vcpus", "placement"),
    [
        (1, None),
        pytest.param(2, "Split", marks=SOAK_ONLY),
        pytest.param(2, "Grouped", marks=SOAK_ONLY),
        pytest.param(4, "Split", marks=SOAK_ONLY),
        pytest.param(4, "Grouped", marks=SOAK_ONLY),
    ],
)
def test_debian_boots_from_its_disk_and_leaves_it_clean(guest_image, debian_disk, no_leftovers, vcpus, placement):
    name = f"disk-{vcpus}-{(placement or 'one').lower()}"
    machine = {"vcpu_count": vcpus, "mem_size_mib": 512, **({} if placement is None else {"vcpu_placement": placement})}
    with no_leftovers(names=(name,)), folder_of_disks(name) as disks:
        image = debian_disk.copy_to(disks / "root.ext4")
        with debian(name, guest_image, image, machine) as guest:
            assert guest.agent.must("nproc; findmnt -n -o SOURCE,FSTYPE /").split() == [str(vcpus), "/dev/vda", "ext4"]
            work = f"({PACKAGES}) >/tmp/said 2>&1 || cat /tmp/said; sync"
            said = guest.agent.must(f"cat /proc/uptime; {work}; cat /proc/uptime", 900.0)
            print(f"uptime before and after the packages: {said}")
            assert guest.agent.must("hello; dpkg --audit") == "Hello, world!\n"
            assert guest.agent.must(f"({COMPLAINTS}) 2>&1") == "no complaint\n"
            guest.end()
        assert re.search(r"^cellblock-root: .*\d+/\d+ files", file_system_is_clean(image), re.MULTILINE)
        assert "Type: regular" in shown_in(image, "/usr/bin/hello")
    assert digest_of(debian_disk.path) == debian_disk.sha256
