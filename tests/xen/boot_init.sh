#!/bin/busybox sh
# Process 1 of dom0's initramfs (tests/xen/dom0.py): mounts the disk and hands over to dom0_init.sh.
export PATH=/bin
/bin/busybox mkdir -p /proc /sys /dev /new
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in /modules/*.ko; do
    insmod "$module"
done
until [ -b /dev/vda ]; do sleep 0.1; done
mount -t ext4 -o rw,noatime /dev/vda /new || exec sh
mount --move /dev /new/dev
umount /proc /sys
exec switch_root /new /sbin/lab-init
