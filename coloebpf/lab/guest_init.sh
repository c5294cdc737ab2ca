#!/bin/busybox sh
# Process 1 of a lab's virtual machine (coloebpf/lab/image.py). The kernel's command line has its addresses, which are
# then variables here: COLO_DISK, and COLO_NICS="10.77.0.10/24,fd77::10/64 10.77.1.10/24,..." with one word for each NIC, and COLO_MTU.
export PATH=/bin
/bin/busybox mkdir -p /proc /sys /dev /tmp /root /var/run /var/log
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp

for module in /modules/*.ko; do
    insmod "$module"
done

# Nothing is said unasked: two copies of a guest that chatter by their clocks only make checkpoints.
cd /proc/sys/net/ipv6/conf
for where in all default; do
    echo 0 >$where/accept_ra
    echo 0 >$where/router_solicitations
    echo 0 >$where/accept_dad
    echo 0 >$where/dad_transmits
done
cd /
# One stack on several subnets of one wire answers ARP only on the right device.
echo 1 >/proc/sys/net/ipv4/conf/all/arp_ignore
echo 2 >/proc/sys/net/ipv4/conf/all/arp_announce
echo 1 >/proc/sys/vm/overcommit_memory

ip link set lo up
number=0
for nic in $(echo "$COLO_NICS" | tr ';' ' '); do
    ip link set eth$number mtu "$COLO_MTU" up
    for address in $(echo "$nic" | tr ',' ' '); do
        ip addr add "$address" dev eth$number
    done
    number=$((number + 1))
done

mkdir -p /dev/pts
mount -t devpts devpts /dev/pts
echo 'root::0:0:root:/root:/bin/sh' >/etc/passwd
echo '/bin/sh' >/etc/shells
chmod 700 /root /root/.ssh
# With a key only; -E: what it says goes to the console.
dropbear -s -E -r /etc/dropbear/dropbear_ed25519_host_key 2>/dev/console

# COLO_DISK: numbers go onto this disk, each into one of 100 blocks in turn; what was written 20 numbers ago must be there
# still, as what another VM has written is not. redis is told, for whoever asks; and asked, for somebody has to want it.
write_numbers() {
    until echo "GET write" | nc -w 1 127.0.0.1 6379 | grep -q '^1'; do
        sleep 1
    done
    i=0
    while :; do
        i=$((i + 1))
        if [ $i -gt 20 ]; then
            is=$(dd if=/dev/$COLO_DISK bs=512 skip=$(((i + 80) % 100)) count=1 iflag=direct 2>/dev/null | head -n 1)
            [ "$is" = "block $((i - 20))" ] || echo "SET bad '$i is $is'" | nc -w 1 127.0.0.1 6379
        fi
        echo "block $i" | dd of=/dev/$COLO_DISK bs=512 seek=$((i % 100)) conv=sync,fsync 2>/dev/null
        echo "SET written $i" | nc -w 1 127.0.0.1 6379
        sleep 1
    done >/dev/null
}
[ -z "$COLO_DISK" ] || write_numbers &

echo "guest: up after $(cut -d ' ' -f 1 /proc/uptime) s" >/dev/console
# Nothing that writes files, one thread, and few ticks: what a replica does by its own clock dirties memory.
redis-server --bind '*' '-::*' --protected-mode no --save '' --appendonly no --io-threads 1 --hz 1 --dynamic-hz no \
    --activerehashing no --tls-port 6380 --tls-ca-cert-file /etc/redis/ca.pem --tls-cert-file /etc/redis/server.pem \
    --tls-key-file /etc/redis/server.key --tls-auth-clients no >/dev/console 2>&1 </dev/null
echo "guest: redis ended with $?" >/dev/console
poweroff -f
