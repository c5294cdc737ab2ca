/* SPDX-License-Identifier: GPL-2.0 */
/* Where frames go in and come out: packet sockets in network namespaces, or the byte streams that QEMU's colo-compare
 * reads and writes ([32-bit big-endian length][frame]). */
#pragma once

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "frame.h"

#define BATCH_MAX 64                    /* frames per write */
#define STREAM_BUFFER (4 << 20)         /* bytes a stream may hold: the peer never waits for us */
#define RING_FRAME 2048                 /* bytes per frame of the receive ring */
#define RING_BLOCK (1 << 16)
#define RING_FRAMES 2048                /* more than any window */

static inline void fail(const char *what)
{
    perror(what);
    exit(2);
}

static inline int must(int result, const char *what)
{
    if (result < 0)
        fail(what);
    return result;
}

static inline void pin(int cpu)
{
    cpu_set_t set;

    if (cpu < 0)
        return;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    must(sched_setaffinity(0, sizeof set, &set), "sched_setaffinity");
}

static inline void parse_mac(uint8_t *mac, const char *text)
{
    if (sscanf(text, "%hhx:%hhx:%hhx:%hhx:%hhx:%hhx", mac, mac + 1, mac + 2, mac + 3, mac + 4, mac + 5) != 6) {
        fprintf(stderr, "%s: not a MAC address\n", text);
        exit(2);
    }
}

/* Tells the starter that the measured part begins or ends, and waits until it has read its meters. */
static inline void mark(void)
{
    puts("mark");
    fflush(stdout);
    getchar();
}

/* One sending side. `next` is the id of the next frame to be written; the other thread reads it. */
struct tx {
    int fd;
    bool stream, pending;
    struct template template;
    _Atomic uint64_t next;
    uint32_t frames, frames_sent;
    size_t bytes, bytes_sent;
    struct mmsghdr messages[BATCH_MAX];
    struct iovec vectors[BATCH_MAX];
    uint8_t buffer[BATCH_MAX * (FRAME_MAX + 4)];
};

struct rx {
    int fd;
    bool stream;
    uint8_t *ring;                      /* packet socket: RING_FRAMES slots */
    uint32_t slot;
    uint8_t *bytes;                     /* stream: what is not yet a whole frame */
    size_t have;
};

static inline int connect_stream(const char *path)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int fd = must(socket(AF_UNIX, SOCK_STREAM, 0), "socket"), size = STREAM_BUFFER;

    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    must(connect(fd, (void *)&address, sizeof address), path);
    must(setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size), "SO_SNDBUF");
    must(setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size), "SO_RCVBUF");
    must(fcntl(fd, F_SETFL, O_NONBLOCK), "O_NONBLOCK");
    return fd;
}

/* `where` is NAMESPACE:DEVICE. The socket stays in that namespace, the thread comes back. */
static inline int packet_socket(const char *where, int *ifindex)
{
    char path[128], *device;
    int home = must(open("/proc/thread-self/ns/net", O_RDONLY), "own network namespace"), there, fd;

    snprintf(path, sizeof path, "/run/netns/%s", where);
    device = strchr(path, ':');
    if (!device) {
        fprintf(stderr, "%s: not NAMESPACE:DEVICE\n", where);
        exit(2);
    }
    *device++ = 0;
    there = must(open(path, O_RDONLY), path);
    must(setns(there, CLONE_NEWNET), "setns");
    *ifindex = if_nametoindex(device);
    if (!*ifindex)
        fail(where);
    fd = must(socket(AF_PACKET, SOCK_RAW, 0), "packet socket");
    must(setns(home, CLONE_NEWNET), "setns back");
    close(there);
    close(home);
    return fd;
}

static inline void bind_packet(int fd, int ifindex, int protocol)
{
    struct sockaddr_ll address = { .sll_family = AF_PACKET, .sll_protocol = htons(protocol), .sll_ifindex = ifindex };

    must(bind(fd, (void *)&address, sizeof address), "bind");
}

static inline void tx_open(struct tx *tx, const char *where, bool stream)
{
    int ifindex;

    tx->stream = stream;
    if (stream) {
        tx->fd = connect_stream(where);
        return;
    }
    tx->fd = packet_socket(where, &ifindex);
    bind_packet(tx->fd, ifindex, 0);    /* protocol 0: hears nothing */
}

static inline void rx_open(struct rx *rx, const char *where, bool stream)
{
    struct tpacket_req ring = { .tp_block_size = RING_BLOCK, .tp_frame_size = RING_FRAME, .tp_frame_nr = RING_FRAMES,
                                .tp_block_nr = RING_FRAMES / (RING_BLOCK / RING_FRAME) };
    int ifindex, version = TPACKET_V2, on = 1;

    rx->stream = stream;
    if (stream) {
        rx->fd = connect_stream(where);
        rx->bytes = malloc(STREAM_BUFFER);
        return;
    }
    rx->fd = packet_socket(where, &ifindex);
    must(setsockopt(rx->fd, SOL_PACKET, PACKET_VERSION, &version, sizeof version), "PACKET_VERSION");
    must(setsockopt(rx->fd, SOL_PACKET, PACKET_IGNORE_OUTGOING, &on, sizeof on), "PACKET_IGNORE_OUTGOING");
    must(setsockopt(rx->fd, SOL_PACKET, PACKET_RX_RING, &ring, sizeof ring), "PACKET_RX_RING");
    rx->ring = mmap(0, (size_t)RING_FRAMES * RING_FRAME, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, rx->fd, 0);
    if (rx->ring == MAP_FAILED)
        fail("mmap of the receive ring");
    bind_packet(rx->fd, ifindex, ETH_P_ALL);
}

/* Writes frames next .. next+count-1 into the buffer; tx_flush() sends them. */
static inline void tx_fill(struct tx *tx, uint32_t count)
{
    uint32_t length = tx->template.length;
    uint8_t *at = tx->buffer;

    for (uint32_t i = 0; i < count; i++) {
        if (tx->stream) {
            put32(at, length);
            at += 4;
        }
        frame_write(&tx->template, at, tx->next + i);
        tx->vectors[i] = (struct iovec){ .iov_base = at, .iov_len = length };
        tx->messages[i].msg_hdr = (struct msghdr){ .msg_iov = &tx->vectors[i], .msg_iovlen = 1 };
        at += length;
    }
    tx->bytes = at - tx->buffer;
    tx->frames = count;
    tx->bytes_sent = tx->frames_sent = 0;
    tx->pending = true;
}

/* True when the whole batch is out. */
static inline bool tx_flush(struct tx *tx)
{
    while (tx->stream ? tx->bytes_sent < tx->bytes : tx->frames_sent < tx->frames) {
        ssize_t done = tx->stream
            ? write(tx->fd, tx->buffer + tx->bytes_sent, tx->bytes - tx->bytes_sent)
            : sendmmsg(tx->fd, tx->messages + tx->frames_sent, tx->frames - tx->frames_sent, 0);
        if (done < 0 && (errno == EAGAIN || errno == ENOBUFS))
            return false;
        must(done, "send");
        if (tx->stream)
            tx->bytes_sent += done;
        else
            tx->frames_sent += done;
    }
    tx->pending = false;
    tx->next += tx->frames;
    return true;
}

typedef void (*frame_handler)(const uint8_t *frame, uint32_t length);

static inline uint32_t rx_stream(struct rx *rx, frame_handler handle)
{
    ssize_t got = read(rx->fd, rx->bytes + rx->have, STREAM_BUFFER - rx->have);
    size_t at = 0;
    uint32_t frames = 0, length;

    if (got < 0 && errno == EAGAIN)
        return 0;
    if (got <= 0)
        fail("the peer closed its output");
    rx->have += got;
    while (rx->have - at >= 4) {
        memcpy(&length, rx->bytes + at, 4);
        length = ntohl(length);
        if (rx->have - at < 4 + length)
            break;
        handle(rx->bytes + at + 4, length);
        at += 4 + length;
        frames++;
    }
    memmove(rx->bytes, rx->bytes + at, rx->have - at);
    rx->have -= at;
    return frames;
}

/* Hands each frame that has arrived to `handle`; returns how many. Never waits. */
static inline uint32_t rx_frames(struct rx *rx, frame_handler handle)
{
    uint32_t frames = 0;

    if (rx->stream)
        return rx_stream(rx, handle);
    for (; frames < RING_FRAMES; frames++) {
        struct tpacket2_hdr *slot = (void *)(rx->ring + (size_t)rx->slot * RING_FRAME);
        if (!(__atomic_load_n(&slot->tp_status, __ATOMIC_ACQUIRE) & TP_STATUS_USER))
            break;
        handle((uint8_t *)slot + slot->tp_mac, slot->tp_len);
        __atomic_store_n(&slot->tp_status, TP_STATUS_KERNEL, __ATOMIC_RELEASE);
        rx->slot = (rx->slot + 1) % RING_FRAMES;
    }
    return frames;
}
