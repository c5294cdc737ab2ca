/* SPDX-License-Identifier: GPL-2.0 */
/* The frames that the benchmark's guests send: written from a template, recognised again at the client. */
#pragma once

#include <arpa/inet.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define FRAME_MAX 1514          /* bytes: Ethernet header and an MTU of 1,500 */
#define ETH_BYTES 14
#define IP_BYTES 20
#define TCP_BYTES 32            /* with the timestamp option that every real stack sends */
#define UDP_BYTES 8
#define ID_BYTES 8              /* the frame's number, at the end of its payload */
#define L4_AT (ETH_BYTES + IP_BYTES)
#define FLOWS_PER_ADDRESS 16384 /* client ports used per client address */
#define FIRST_CLIENT_PORT 1024

struct traffic {
    bool tcp;
    uint32_t payload;           /* bytes */
    uint32_t flows;
    uint32_t net;               /* a run's own block of client addresses: no run meets an older one's flows */
    uint8_t guest_mac[6], client_mac[6];
};

/* What both replicas send alike, and the little in which real replicas differ (IP id, timestamp clock). */
struct template {
    struct traffic traffic;
    uint8_t bytes[FRAME_MAX];
    uint32_t length;
    uint16_t ip_sum, l4_sum;    /* ones' complement sums of the fixed parts */
    uint16_t ip_id_salt;
    uint32_t clock_salt;
};

static inline uint16_t fold(uint64_t sum)
{
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return sum;
}

static inline uint64_t sum_of(const void *from, uint32_t bytes)
{
    const uint8_t *p = from;
    uint64_t sum = 0;
    uint16_t word;

    for (; bytes > 1; p += 2, bytes -= 2) {
        memcpy(&word, p, 2);
        sum += word;
    }
    if (bytes)
        sum += *p;              /* little endian: the pad byte is the high one */
    return sum;
}

static inline void put16(uint8_t *at, uint16_t value) { value = htons(value); memcpy(at, &value, 2); }
static inline void put32(uint8_t *at, uint32_t value) { value = htonl(value); memcpy(at, &value, 4); }

static inline uint32_t client_address(const struct traffic *t, uint32_t flow)
{
    return 10u << 24 | t->net << 8 | (1 + flow / FLOWS_PER_ADDRESS);
}

static inline uint32_t l4_bytes(const struct traffic *t) { return (t->tcp ? TCP_BYTES : UDP_BYTES) + t->payload; }

static inline void template_init(struct template *tp, const struct traffic *t, bool secondary)
{
    uint8_t *ip = tp->bytes + ETH_BYTES, *l4 = tp->bytes + L4_AT, *payload = l4 + (t->tcp ? TCP_BYTES : UDP_BYTES);
    uint32_t noise = 0x9e3779b9;

    memset(tp, 0, sizeof *tp);
    tp->traffic = *t;
    tp->length = L4_AT + l4_bytes(t);
    tp->ip_id_salt = secondary ? 0x5a5a : 0;
    tp->clock_salt = secondary ? 77777 : 0;
    memcpy(tp->bytes, t->client_mac, 6);
    memcpy(tp->bytes + 6, t->guest_mac, 6);
    put16(tp->bytes + 12, 0x0800);
    ip[0] = 0x45;
    put16(ip + 2, tp->length - ETH_BYTES);
    ip[8] = 64;
    ip[9] = t->tcp ? IPPROTO_TCP : IPPROTO_UDP;
    put32(ip + 12, 10u << 24 | 77 << 16 | 10);
    put16(l4, t->tcp ? 80 : 5000);
    if (t->tcp) {
        put32(l4 + 8, 77);                      /* the client says nothing: its ACK never moves */
        l4[12] = TCP_BYTES / 4 << 4;
        l4[13] = 0x10;                          /* ACK */
        put16(l4 + 14, 0xffff);
        memcpy(l4 + 20, "\1\1\x08\x0a", 4);     /* two NOPs, timestamp */
    } else {
        put16(l4 + 4, UDP_BYTES + t->payload);
    }
    for (uint32_t i = 0; i + ID_BYTES < t->payload; i++) {
        noise = noise * 1664525 + 1013904223;
        payload[i] = noise >> 24;
    }
    tp->ip_sum = fold(sum_of(ip, IP_BYTES));
    /* pseudo header: the guest's address, protocol and length; the client's address comes per frame */
    tp->l4_sum = fold(sum_of(l4, l4_bytes(t)) + sum_of(ip + 12, 4) + htons(ip[9]) + htons(l4_bytes(t)));
}

/* Frame `id` belongs to flow id % flows and is that flow's (id / flows)-th. */
static inline void frame_write(const struct template *tp, uint8_t *frame, uint64_t id)
{
    const struct traffic *t = &tp->traffic;
    uint32_t flow = id % t->flows, nth = id / t->flows;
    uint8_t *ip = frame + ETH_BYTES, *l4 = frame + L4_AT;
    uint64_t sum;
    uint16_t check;

    memcpy(frame, tp->bytes, tp->length);
    put16(ip + 4, (uint16_t)id + tp->ip_id_salt);
    put32(ip + 16, client_address(t, flow));
    check = ~fold(tp->ip_sum + sum_of(ip + 4, 2) + sum_of(ip + 16, 4));
    memcpy(ip + 10, &check, 2);
    put16(l4 + 2, FIRST_CLIENT_PORT + flow % FLOWS_PER_ADDRESS);
    memcpy(frame + tp->length - ID_BYTES, &id, ID_BYTES);
    sum = tp->l4_sum + sum_of(ip + 16, 4) + sum_of(l4 + 2, 2) + sum_of(&id, ID_BYTES);
    if (t->tcp) {
        put32(l4 + 4, 1000 + nth * t->payload);
        put32(l4 + 24, 12345 + nth / 64 + tp->clock_salt);
        sum += sum_of(l4 + 4, 4) + sum_of(l4 + 24, 4);
    }
    check = ~fold(sum);
    if (!t->tcp && !check)
        check = 0xffff;         /* RFC 768: zero would mean "no checksum" */
    memcpy(l4 + (t->tcp ? 16 : 6), &check, 2);
}

/* The id of a frame of this run, or false for any other frame that the client hears. */
static inline bool frame_read(const struct template *tp, const uint8_t *frame, uint32_t length, uint64_t *id)
{
    uint32_t address;

    if (length != tp->length || memcmp(frame, tp->bytes, ETH_BYTES))
        return false;
    memcpy(&address, frame + ETH_BYTES + 16, 4);
    if ((ntohl(address) & 0xffffff00) != (client_address(&tp->traffic, 0) & 0xffffff00))
        return false;
    memcpy(id, frame + length - ID_BYTES, ID_BYTES);
    return true;
}
