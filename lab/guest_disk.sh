#!/bin/sh
# Makes a root file system that mmdebstrap has filled with Debian packages fit for a microVM; runs on the host, as root.
# Usage: guest_disk.sh ROOT AGENT PACKAGE…   (packages that are laid into /srv/packages, for tests that install them)
set -eu
root=$1
agent=$2
shift 2

install -m 755 "$agent" "$root/usr/local/sbin/cellblock-agent"
echo cellblock >"$root/etc/hostname"
printf '127.0.0.1 localhost\n127.0.1.1 cellblock\n' >"$root/etc/hosts"
echo '/dev/vda / ext4 errors=remount-ro 0 1' >"$root/etc/fstab"
# root needs no password at the console; sshd lets nobody in without one.
sed -i 's/^root:[^:]*:/root::/' "$root/etc/shadow"
# Its own, but not the first boot, in which systemd would set everything up anew.
echo 5c11b10c5c11b10c5c11b10c5c11b10c >"$root/etc/machine-id"
# Nothing that a machine without a screen, a network or an operator would only wait for.
for unit in getty@tty1.service getty-static.service e2scrub_reap.service apt-daily.timer apt-daily-upgrade.timer \
    e2scrub_all.timer dpkg-db-backup.timer fstrim.timer; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
# /usr is not newer than what was made from it: systemd need not make users, caches and hardware lists at every boot.
touch "$root/etc/.updated" "$root/var/.updated"
mkdir -p "$root/etc/systemd/journald.conf.d" "$root/srv/packages"
printf '[Journal]\nStorage=volatile\n' >"$root/etc/systemd/journald.conf.d/volatile.conf"
cd "$root/srv/packages"
APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get -q -o APT::Sandbox::User=root download "$@"
