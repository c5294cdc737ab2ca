#!/bin/sh
# Process 1 of a lab's dom0 (tests/xen/dom0.py): what Debian's init scripts would do, in seconds on an emulated CPU.
# The kernel's command line has LAB_HOST, which is a variable here.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TERM=dumb
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -o remount,rw /
# Xen's hotplug scripts take their lock through /dev/stdin.
ln -sfn /proc/self/fd /dev/fd
for number in 0:stdin 1:stdout 2:stderr; do ln -sf "/proc/self/fd/${number%%:*}" "/dev/${number#*:}"; done
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
for where in /dev/shm /run /tmp; do mount -t tmpfs tmpfs $where; done
mount -t bpf bpf /sys/fs/bpf
mount -t debugfs debugfs /sys/kernel/debug
mkdir -p /run/lock /run/sshd /run/xen /run/xenstored /var/log/xen/console /var/lib/xen /var/lib/xenstored

say() { echo "dom0: $1 after $(cut -d ' ' -f 1 /proc/uptime) s"; }

hostname "host$LAB_HOST"
# ifb and sch_plug are what libxl's own buffer of Remus is made of.
modprobe ifb numifbs=4
for module in xenfs xen-evtchn xen-gntdev xen-gntalloc xen-privcmd xen-netback xen-blkback tun loop nbd bridge virtio_net \
    sch_plug sch_ingress cls_bpf cls_u32 act_mirred; do
    modprobe $module
done
mount -t xenfs xenfs /proc/xen

ip link set lo up
# By MAC (tests/xen/plan.py).
for device in /sys/class/net/*; do
    case $(cat "$device/address") in
    52:54:00:c0:00:*) ip link set "${device##*/}" name mgmt0 ;;
    52:54:00:c0:01:*) ip link set "${device##*/}" name fwd0 ;;
    52:54:00:c0:02:*) ip link set "${device##*/}" name peer0 ;;
    52:54:00:c0:03:*) ip link set "${device##*/}" name lan0 ;;
    esac
done
ip addr add "10.78.0.$LAB_HOST/24" dev mgmt0
ip addr add "10.79.0.$LAB_HOST/24" dev peer0
ip link add xenbr0 type bridge forward_delay 0
ip link set lan0 master xenbr0
ip addr add "10.77.0.$LAB_HOST/24" dev xenbr0
ip addr add "fd77::$LAB_HOST/64" dev xenbr0 nodad
for device in fwd0 peer0; do ip link set $device mtu 9000; done
for device in mgmt0 fwd0 peer0 lan0 xenbr0; do ip link set $device up; done
/usr/sbin/sshd
say "network and sshd"

if grep -q control_d /proc/xen/capabilities; then
    xen=/usr/lib/xen-4.17/bin
    $xen/xenstored --pid-file /run/xenstored.pid
    $xen/xen-init-dom0
    $xen/xenconsoled --pid-file=/run/xenconsoled.pid --log=all
    # The backend of disks that are files.
    setsid /usr/libexec/xen-qemu-system-i386 -xen-domid 0 -xen-attach -name dom0 -nographic -M xenpv -monitor none -serial none \
        -parallel none >/var/log/xen/qemu-dom0.log 2>&1 </dev/null &
    xl list
fi
say "XENLAB-READY"
# Orphans come to process 1.
while :; do
    wait
    sleep 60
done
