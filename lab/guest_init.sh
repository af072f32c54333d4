#!/bin/sh
# First program of a guest that the tests boot: loads the drivers of the devices that are there, runs what the kernel
# command line asks for, and reports on the console in lines that begin with CELLBLOCK- (docs/lab.md).
#   cellblock.run=COMMANDS   shell commands, percent-encoded
#   cellblock.script=DEVICE  shell script on a block device (up to its NULs)
#   cellblock.modules=A,B    modules to load besides those that devices ask for
#   cellblock.end=reboot|poweroff|stay   afterwards; stay (the default without commands): take lines from the console
#   root=DEVICE [rw]         hand over to /sbin/init on an ext4 file system, after cellblock.modules; all else is its own
# /cellblock/script, from an archive appended to this one, runs too.
export PATH=/bin
mount -t proc proc /proc
read -r uptime idle </proc/uptime
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
echo "CELLBLOCK-INIT uptime=$uptime"

load() {
    while read -r module; do
        [ -d "/sys/module/${module%%.ko*}" ] || insmod "/modules/$module" || echo "CELLBLOCK-NO-MODULE $module"
    done <"/modules/needs/$1"
}
for device in /sys/bus/platform/devices/LNRO0005:*; do [ -e "$device" ] && load virtio_mmio && break; done
for device in /sys/bus/pci/devices/*/vendor; do
    [ -e "$device" ] || break
    read -r vendor <"$device"
    [ "$vendor" = 0x1af4 ] && load virtio_pci && break
done
for device in /sys/bus/virtio/devices/*/device; do
    [ -e "$device" ] || break
    read -r type <"$device"
    [ -e "/modules/virtio/$type" ] && read -r module <"/modules/virtio/$type" && load "$module"
done

read -r cmdline </proc/cmdline
run= script= modules= end= root= mode=ro
for word in $cmdline; do
    case $word in
    cellblock.run=*) run=$(printf %b "$(echo "${word#*=}" | sed 's/\\/\\\\/g; s/%/\\x/g')") ;;
    cellblock.script=*) script=${word#*=} ;;
    cellblock.modules=*) modules=$(echo "${word#*=}" | tr , ' ') ;;
    cellblock.end=*) end=${word#*=} ;;
    root=*) root=${word#*=} ;;
    ro | rw) mode=$word ;;
    esac
done
for module in $modules; do load "$module"; done

if [ -n "$root" ]; then
    load ext4
    mkdir /root.new
    mount -t ext4 -o "$mode" "$root" /root.new && mount --move /dev /root.new/dev && exec switch_root /root.new /sbin/init
    echo "CELLBLOCK-NO-ROOT $root"
fi

report() {
    "$@"
    echo "CELLBLOCK-RUN end status=$?"
}
if [ -e /cellblock/script ]; then
    echo "CELLBLOCK-RUN begin /cellblock/script"
    report sh /cellblock/script
fi
if [ -n "$script" ]; then
    echo "CELLBLOCK-RUN begin $script"
    tr -d '\000' <"$script" >/run.sh
    report sh /run.sh
fi
if [ -n "$run" ]; then
    echo "CELLBLOCK-RUN begin cellblock.run"
    report sh -c "$run"
fi
[ -n "$run$script$end" ] || end=stay
if [ "$end" = stay ]; then
    echo "CELLBLOCK-READY"
    while read -r line; do
        [ "$line" = "exit" ] && break
        report sh -c "$line"
    done
fi
read -r uptime idle </proc/uptime
echo "CELLBLOCK-DONE uptime=$uptime"
case $end in
poweroff) poweroff -f ;;
*) reboot -f ;;
esac
