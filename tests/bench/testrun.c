/* SPDX-License-Identifier: GPL-2.0 */
/* Runs hooks by BPF_PROG_TEST_RUN, frame by frame.
 *
 * A run with `repeat` would show a hook the same frame again and again: one flow, one sequence number, and after the
 * first time a retransmission. Here each frame is a run of its own, and goes through all steps before the next one:
 *   --step skb:FD:IFINDEX:WHO   a tc program, as if the frame were at this device
 *   --step xdp:FD:IFINDEX:WHO   an XDP program with live frames: what it passes goes on through the device's stack
 * FD is a program that the starter left open. WHO sends the frame: primary, secondary or client. Marks where each flow has had its first frames, and the end: what the programs took
 * in between, the kernel has counted (bpf_prog_info).
 */
#include "port.h"

#include <getopt.h>
#include <linux/bpf.h>
#include <sys/syscall.h>

#define STEPS_MAX 4
#define WARM_FRAMES 2000        /* at least; and one of each flow */

enum sender { PRIMARY, SECONDARY, CLIENT };

struct step {
    bool xdp;
    int program;
    uint32_t ifindex;
    enum sender sender;
};

static struct step steps[STEPS_MAX];
static uint32_t step_count;
static struct template templates[2];
static uint8_t frame[FRAME_MAX];

static void add_step(char *text)
{
    static const char *senders[] = { "primary", "secondary", "client" };
    char *kind = strtok(text, ":"), *program = strtok(NULL, ":"), *ifindex = strtok(NULL, ":"), *who = strtok(NULL, ":");
    struct step *step = &steps[step_count++];

    if (!who || step_count > STEPS_MAX) {
        fprintf(stderr, "testrun: a step is skb|xdp:FD:IFINDEX:WHO, and there are %d at most\n", STEPS_MAX);
        exit(2);
    }
    step->xdp = !strcmp(kind, "xdp");
    step->program = atoi(program);
    step->ifindex = atoi(ifindex);
    while (strcmp(who, senders[step->sender]))
        if (++step->sender > CLIENT) {
            fprintf(stderr, "testrun: %s: not primary, secondary or client\n", who);
            exit(2);
        }
}

static void swap(uint8_t *a, uint8_t *b, uint32_t bytes)
{
    while (bytes--) {
        uint8_t byte = *a;
        *a++ = *b;
        *b++ = byte;
    }
}

/* The same frame the other way round: addresses and ports change places, so the checksums stay right. */
static void turn(uint8_t *f)
{
    swap(f, f + 6, 6);
    swap(f + ETH_BYTES + 12, f + ETH_BYTES + 16, 4);
    swap(f + L4_AT, f + L4_AT + 2, 2);
}

static void run(const struct step *step, uint64_t id)
{
    const struct template *tp = &templates[step->sender == SECONDARY];
    struct __sk_buff skb = { .ifindex = step->ifindex };
    struct xdp_md xdp = { .data_end = tp->length, .ingress_ifindex = step->ifindex };
    union bpf_attr attr = { 0 };

    frame_write(tp, frame, id);
    if (step->sender == CLIENT)
        turn(frame);
    attr.test.prog_fd = step->program;
    attr.test.data_in = (uintptr_t)frame;
    attr.test.data_size_in = tp->length;
    attr.test.repeat = 1;
    attr.test.flags = step->xdp ? BPF_F_TEST_XDP_LIVE_FRAMES : 0;
    attr.test.ctx_in = (uintptr_t)(step->xdp ? (void *)&xdp : (void *)&skb);
    attr.test.ctx_size_in = step->xdp ? sizeof xdp : sizeof skb;
    must(syscall(SYS_bpf, BPF_PROG_TEST_RUN, &attr, sizeof attr), "BPF_PROG_TEST_RUN");
}

int main(int argc, char **argv)
{
    enum { STEP, TCP, PAYLOAD, FLOWS, NET, GUEST_MAC, CLIENT_MAC, FRAMES, CPU };
    static const struct option names[] = { { "step", 1, 0, STEP }, { "tcp", 0, 0, TCP }, { "payload", 1, 0, PAYLOAD },
        { "flows", 1, 0, FLOWS }, { "net", 1, 0, NET }, { "guest-mac", 1, 0, GUEST_MAC },
        { "client-mac", 1, 0, CLIENT_MAC }, { "frames", 1, 0, FRAMES }, { "cpu", 1, 0, CPU }, { 0, 0, 0, 0 } };
    struct traffic t = { .payload = 22, .flows = 1 };
    uint64_t frames = 10000, warm, id = 0;
    int which;

    while ((which = getopt_long(argc, argv, "", names, 0)) != -1)
        switch (which) {
        case STEP: add_step(optarg); break;
        case TCP: t.tcp = true; break;
        case PAYLOAD: t.payload = atoi(optarg); break;
        case FLOWS: t.flows = atoi(optarg); break;
        case NET: t.net = atoi(optarg); break;
        case GUEST_MAC: parse_mac(t.guest_mac, optarg); break;
        case CLIENT_MAC: parse_mac(t.client_mac, optarg); break;
        case FRAMES: frames = atoll(optarg); break;
        case CPU: pin(atoi(optarg)); break;
        default: exit(2);
        }
    template_init(&templates[0], &t, false);
    template_init(&templates[1], &t, true);
    warm = t.flows > WARM_FRAMES ? t.flows : WARM_FRAMES;
    for (; id < warm + frames; id++) {
        if (id == warm)
            mark();
        for (uint32_t i = 0; i < step_count; i++)
            run(&steps[i], id);
    }
    mark();
    return 0;
}
