/* SPDX-License-Identifier: GPL-2.0 */
/* The benchmark's two guests and their client in one process.
 *
 * Sends the same frames as the primary and as the secondary guest, hears what is released to the client, checks that
 * each came once and in order, and prints one JSON object. In the closed loop it marks where the measured part begins and ends, for
 * whoever reads other meters (see mark() in port.h).
 *   closed loop (no --rate): as fast as it goes with at most --window frames unreleased
 *   open loop   (--rate R):  R frames a second, the secondary's --lag-us after the primary's (negative: before);
 *                            latency runs from the later of a frame's two writes to its reading at the client
 * The ports are NAMESPACE:DEVICE, or socket paths with --stream. Without --sec only the primary sends.
 */
#include "audit.h"
#include "usage.h"

#include <getopt.h>
#include <poll.h>
#include <pthread.h>

#define WARM_SECONDS 0.3
#define WARM_ROUNDS 2                   /* and so many frames of each flow: it is known by then */
#define STALL_SECONDS 1.0               /* no progress for so long: frames are lost */
#define IDLE_POLL_MS 20
#define STREAM_SETTLE_US 100000         /* a peer drops what it releases before it has accepted all connections */
#define WARM_SHARE 20                   /* open loop: the first 1/20 of the frames isn't counted */

static struct options {
    const char *pri, *sec, *out, *notify;
    bool stream;
    struct traffic traffic;
    double seconds, rate, lag;
    int lead;                           /* > 0: the secondary leads by so many frames; < 0: the primary */
    uint32_t batch, window;
    int cpu, secondary_cpu;             /* secondary_cpu >= 0: a thread of its own sends the secondary's frames */
} opt = { .seconds = 2, .batch = 16, .window = 256, .cpu = -1, .secondary_cpu = -1,
          .traffic = { .payload = 22, .flows = 1, .net = 64 << 8 } };

static struct tx primary, secondary;
static struct rx client, notes;
static uint64_t notified;
static atomic_bool stopping, done;

/* ---- sending -------------------------------------------------------------------------------------------------- */

/* May this side write its next batch? The leader stays `lead` frames ahead and within the window of what the client
 * has got; the follower never passes that distance until the end, when it catches up. */
static bool may_send(const struct tx *side)
{
    bool secondary_leads = opt.lead >= 0 && opt.sec;
    const struct tx *leader = secondary_leads ? &secondary : &primary;
    uint64_t gap = abs(opt.lead);

    if (side == leader) {
        const struct tx *follower = secondary_leads ? &primary : &secondary;
        return !stopping && side->next + opt.batch <= audit.got + opt.window && side->next + opt.batch < IDS_MAX
            && (!opt.sec || side->next <= follower->next + gap);
    }
    return side->next + opt.batch + (stopping ? 0 : gap) <= leader->next;
}

static bool send_side(struct tx *side)
{
    if (!side->pending) {
        if (!may_send(side))
            return false;
        tx_fill(side, opt.batch);
    }
    return tx_flush(side);
}

static void *secondary_thread(void *unused)
{
    (void)unused;
    pin(opt.secondary_cpu);
    while (!done)
        if (!send_side(&secondary))
            sched_yield();
    return NULL;
}

static void note(const uint8_t *text, uint32_t length)
{
    (void)text;
    (void)length;
    notified++;
}

static uint32_t receive(void)
{
    uint32_t frames = rx_frames(&client, audit_frame);

    if (opt.notify)
        rx_frames(&notes, note);
    return frames;
}

/* ---- closed loop ---------------------------------------------------------------------------------------------- */

static void wait_for_work(void)
{
    struct pollfd fds[] = { { client.fd, POLLIN, 0 }, { primary.fd, primary.pending ? POLLOUT : 0, 0 },
                            { secondary.fd, secondary.pending ? POLLOUT : 0, 0 } };

    if (opt.secondary_cpu >= 0)
        sched_yield();          /* the other thread's progress wakes nobody */
    else
        poll(fds, opt.sec ? 3 : 2, IDLE_POLL_MS);
}

static bool all_came(void)
{
    return !primary.pending && (!opt.sec || (!secondary.pending && primary.next == secondary.next))
        && audit.got == primary.next;
}

static void closed_loop(void)
{
    struct usage from = { 0 }, to = { 0 };
    double start = now(), t = start, last = start, span;
    bool two_threads = opt.sec && opt.secondary_cpu >= 0, stalled = false;
    struct tx *first = opt.lead >= 0 ? &secondary : &primary, *second = opt.lead >= 0 ? &primary : &secondary;
    pthread_t thread;
    uint64_t packets;

    if (two_threads && pthread_create(&thread, NULL, secondary_thread, NULL))
        fail("pthread_create");
    while (!(stopping && all_came())) {
        bool progress = false;

        t = now();
        if (!from.at && t - start > WARM_SECONDS && audit.got >= (uint64_t)opt.traffic.flows * WARM_ROUNDS)
            from = usage_mark(audit.got);
        if (from.at && !stopping && t - from.at > opt.seconds) {
            to = usage_mark(audit.got);
            stopping = true;
        }
        if (opt.sec && !two_threads)
            progress |= send_side(first) | send_side(second);
        else
            progress |= send_side(&primary);
        progress |= receive() > 0;
        if (progress)
            last = t;
        else if (t - last > STALL_SECONDS) {
            stalled = true;
            break;
        } else
            wait_for_work();
    }
    done = true;
    if (two_threads)
        pthread_join(thread, NULL);
    if (!from.at)
        from = usage_mark(audit.got);
    if (!to.at)
        to = usage_mark(audit.got);
    span = to.at - from.at;
    packets = to.got - from.got;
    printf("{\"seconds\": %.4f, \"packets\": %lu, \"pps\": %.0f, \"gbit\": %.4f, \"busy_s\": %.4f, \"user_s\": %.4f, "
           "\"own_cpu_s\": %.4f, \"own_user_s\": %.4f, \"stalled\": %s, ", span, packets, packets / span,
           packets / span * primary.template.length * 8e-9, to.busy - from.busy, to.user - from.user, to.own - from.own,
           to.own_user - from.own_user, stalled ? "true" : "false");
}

/* ---- open loop ------------------------------------------------------------------------------------------------ */

static void send_one(struct tx *side, double *written)
{
    if (!side->pending) {
        tx_fill(side, 1);
        written[side->next] = now();
    }
    tx_flush(side);
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static void print_percentiles(double *latency, uint64_t n)
{
    static const struct { const char *name; double share; } points[] = {
        { "min_us", 0 }, { "p50_us", .5 }, { "p90_us", .9 }, { "p99_us", .99 }, { "p999_us", .999 }, { "max_us", 1 } };

    qsort(latency, n, sizeof *latency, by_value);
    for (unsigned i = 0; i < sizeof points / sizeof *points; i++)
        printf("\"%s\": %.2f, ", points[i].name, n ? latency[(uint64_t)((n - 1) * points[i].share)] * 1e6 : -1);
}

static void open_loop(void)
{
    uint64_t frames = opt.rate * opt.seconds, n = 0, counted = frames - frames / WARM_SHARE;
    double *primary_at = calloc(frames + 1, 8), *secondary_at = calloc(frames + 1, 8), *latency = calloc(frames + 1, 8);
    double start, end, t;

    audit.arrived = calloc(frames + 1, 8);
    if (!primary_at || !secondary_at || !latency || !audit.arrived)
        fail("memory for the latencies");
    start = now() + 0.01;
    end = start + opt.seconds + STALL_SECONDS;
    while (audit.got < frames && (t = now()) < end) {
        /* with no lag the secondary is written first, as in the closed loop's lock-step */
        bool secondary_due = opt.sec && secondary.next < frames
            && t >= start + secondary.next / opt.rate + (opt.lag > 0 ? opt.lag : 0);
        if (secondary_due)
            send_one(&secondary, secondary_at);
        bool primary_due = primary.next < frames && t >= start + primary.next / opt.rate + (opt.lag < 0 ? -opt.lag : 0)
            && (!opt.sec || opt.lag > 0 || primary.next < secondary.next);
        if (primary_due)
            send_one(&primary, primary_at);
        audit.now = now();
        receive();
    }
    for (uint64_t i = frames - counted; i < frames; i++) {
        double later = primary_at[i] > secondary_at[i] ? primary_at[i] : secondary_at[i];
        if (audit.arrived[i])
            latency[n++] = audit.arrived[i] - later;
    }
    printf("{\"counted\": %lu, ", n);
    print_percentiles(latency, n);
}

/* ---- start ---------------------------------------------------------------------------------------------------- */

static void parse(int argc, char **argv)
{
    enum { PRI, SEC, OUT, NOTIFY, STREAM, TCP, PAYLOAD, FLOWS, NET, GUEST_MAC, CLIENT_MAC, SECONDS, RATE, LAG, LEAD, BATCH,
           WINDOW, CPU, SECONDARY_CPU };
    static const struct option names[] = {
        { "pri", 1, 0, PRI }, { "sec", 1, 0, SEC }, { "out", 1, 0, OUT }, { "notify", 1, 0, NOTIFY },
        { "stream", 0, 0, STREAM }, { "tcp", 0, 0, TCP }, { "payload", 1, 0, PAYLOAD }, { "flows", 1, 0, FLOWS },
        { "net", 1, 0, NET }, { "guest-mac", 1, 0, GUEST_MAC }, { "client-mac", 1, 0, CLIENT_MAC },
        { "seconds", 1, 0, SECONDS }, { "rate", 1, 0, RATE }, { "lag-us", 1, 0, LAG }, { "lead", 1, 0, LEAD },
        { "batch", 1, 0, BATCH }, { "window", 1, 0, WINDOW }, { "cpu", 1, 0, CPU },
        { "secondary-cpu", 1, 0, SECONDARY_CPU }, { 0, 0, 0, 0 } };
    struct traffic *t = &opt.traffic;
    int which;

    while ((which = getopt_long(argc, argv, "", names, 0)) != -1)
        switch (which) {
        case PRI: opt.pri = optarg; break;
        case SEC: opt.sec = optarg; break;
        case OUT: opt.out = optarg; break;
        case NOTIFY: opt.notify = optarg; break;
        case STREAM: opt.stream = true; break;
        case TCP: t->tcp = true; break;
        case PAYLOAD: t->payload = atoi(optarg); break;
        case FLOWS: t->flows = atoi(optarg); break;
        case NET: t->net = atoi(optarg); break;
        case GUEST_MAC: parse_mac(t->guest_mac, optarg); break;
        case CLIENT_MAC: parse_mac(t->client_mac, optarg); break;
        case SECONDS: opt.seconds = atof(optarg); break;
        case RATE: opt.rate = atof(optarg); break;
        case LAG: opt.lag = atof(optarg) * 1e-6; break;
        case LEAD: opt.lead = atoi(optarg); break;
        case BATCH: opt.batch = atoi(optarg); break;
        case WINDOW: opt.window = atoi(optarg); break;
        case CPU: opt.cpu = atoi(optarg); break;
        case SECONDARY_CPU: opt.secondary_cpu = atoi(optarg); break;
        default: exit(2);
        }
    if (!opt.pri || !opt.out || t->payload < ID_BYTES || L4_AT + l4_bytes(t) > FRAME_MAX || !t->flows || !opt.batch
        || opt.batch > BATCH_MAX || abs(opt.lead) + 2 * opt.batch > opt.window || opt.window > RING_FRAMES) {
        fprintf(stderr, "feeder: --pri and --out are needed, and sizes that fit together\n");
        exit(2);
    }
}

int main(int argc, char **argv)
{
    parse(argc, argv);
    pin(opt.cpu);
    template_init(&primary.template, &opt.traffic, false);
    template_init(&secondary.template, &opt.traffic, true);
    audit_init(&primary.template);
    rx_open(&client, opt.out, opt.stream);
    if (opt.notify)
        rx_open(&notes, opt.notify, true);
    tx_open(&primary, opt.pri, opt.stream);
    if (opt.sec)
        tx_open(&secondary, opt.sec, opt.stream);
    if (opt.stream)
        usleep(STREAM_SETTLE_US);
    if (opt.rate > 0)
        open_loop();
    else
        closed_loop();
    printf("\"sent\": %lu, \"lost\": %lu, \"reordered\": %lu, \"duplicates\": %lu, \"foreign\": %lu, \"notified\": %lu}\n",
           primary.next, primary.next - audit.got, audit.reordered, audit.duplicates, audit.foreign, notified);
    return 0;
}
