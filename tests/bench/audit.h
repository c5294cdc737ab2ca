/* SPDX-License-Identifier: GPL-2.0 */
/* What the client got: every frame exactly once, in order within its flow? */
#pragma once

#include "port.h"

#define IDS_MAX (1ull << 27)    /* frames one run may send; a bit each, touched as they come */

static struct {
    const struct template *expected;
    _Atomic uint64_t got;       /* distinct frames of this run */
    uint64_t reordered, duplicates, foreign;
    uint64_t *seen;             /* bit per id */
    uint32_t *next_in_flow;
    double *arrived;            /* open loop: when each id was read, 0 = not yet */
    double now;
} audit;

static inline void audit_init(const struct template *expected)
{
    audit.expected = expected;
    audit.seen = calloc(IDS_MAX / 64, 8);
    audit.next_in_flow = calloc(expected->traffic.flows, sizeof *audit.next_in_flow);
    if (!audit.seen || !audit.next_in_flow)
        fail("memory for the audit");
}

static inline void audit_frame(const uint8_t *frame, uint32_t length)
{
    uint64_t id, bit;
    uint32_t flows = audit.expected->traffic.flows, nth;

    if (!frame_read(audit.expected, frame, length, &id) || id >= IDS_MAX) {
        audit.foreign++;
        return;
    }
    bit = 1ull << id % 64;
    if (audit.seen[id / 64] & bit) {
        audit.duplicates++;
        return;
    }
    audit.seen[id / 64] |= bit;
    nth = id / flows;
    if (nth < audit.next_in_flow[id % flows])
        audit.reordered++;      /* a later frame of its flow came first */
    else
        audit.next_in_flow[id % flows] = nth + 1;
    if (audit.arrived)
        audit.arrived[id] = audit.now;
    audit.got++;
}
