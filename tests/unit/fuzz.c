/* SPDX-License-Identifier: GPL-2.0 */
/* Shows mutated frames to hooks by BPF_PROG_TEST_RUN, as fast as the system call goes. A library of tests/unit/test_fuzz.py. */
#include <errno.h>
#include <linux/bpf.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define FRAME_MAX 1600 /* longer than any that a slot takes */
#define FRAME_MIN 14   /* BPF_PROG_TEST_RUN's demand */
#define HEADERS 96     /* where mutations are aimed at */

enum { SKB, XDP, XDP_LIVE }; /* live: what XDP passes goes on through the device's stack */
enum { PASSED, DROPPED, REDIRECTED, OTHER, REFUSED, OUTCOMES }; /* refused: by the kernel, before the program ran */

struct hook {
    int32_t program;
    uint32_t ifindex, kind;
    uint32_t one_in;   /* frames */
    uint32_t gso_size; /* SKB only; the frame's payload is cut at this */
    uint64_t outcomes[OUTCOMES];
};

struct frame {
    uint32_t length;
    uint8_t byte[FRAME_MAX];
};

static uint64_t state;

static uint32_t draw(uint32_t below) /* xorshift64*, Vigna */
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (uint32_t)((state * 2685821657736338717ull) >> 32) % below;
}

static void mutate(struct frame *f)
{
    static const uint8_t telling[] = { 0, 1, 2, 4, 5, 6, 8, 17, 43, 44, 51, 58, 59, 60, 0x45, 0x46, 0x60, 0x7f, 0x80, 0x81, 0x86, 0xa8, 0xdd, 0xff };
    uint32_t top = f->length < HEADERS ? f->length : HEADERS, at, n;

    switch (draw(8)) {
    case 0: f->byte[draw(top)] ^= 1u << draw(8); break;
    case 1: f->byte[draw(top)] = telling[draw(sizeof telling)]; break;
    case 2: f->length = FRAME_MIN + draw(f->length - FRAME_MIN + 1); break; /* truncated */
    case 3: /* junk behind it */
        for (n = draw(64); n && f->length < FRAME_MAX; n--)
            f->byte[f->length++] = draw(256);
        break;
    case 4: /* a length or an offset: any 16 bits */
        at = 12 + draw(top > 14 ? top - 13 : 1);
        f->byte[at] = draw(4) ? 0 : draw(256);
        f->byte[at + 1] = draw(256);
        break;
    case 5: /* bytes moved up: a header twice */
        at = 12 + draw(top > 12 ? top - 12 + 1 : 1);
        n = 4 * (1 + draw(10));
        if (at + n <= f->length && f->length + n <= FRAME_MAX) {
            memmove(f->byte + at + n, f->byte + at, f->length - at);
            f->length += n;
        }
        break;
    case 6: /* bytes taken out */
        at = 12 + draw(top > 12 ? top - 12 + 1 : 1);
        n = 1 + draw(8);
        if (at + n <= f->length && f->length - n >= FRAME_MIN) {
            memmove(f->byte + at, f->byte + at + n, f->length - at - n);
            f->length -= n;
        }
        break;
    case 7: /* noise */
        for (at = draw(f->length), n = draw(32); n && at < f->length; n--)
            f->byte[at++] = draw(256);
        break;
    }
}

static int run(struct hook *hook, const struct frame *f)
{
    struct __sk_buff skb = { .ifindex = hook->ifindex, .gso_size = hook->gso_size };
    struct xdp_md xdp = { .data_end = f->length, .ingress_ifindex = hook->ifindex };
    union bpf_attr attr = { 0 };

    attr.test.prog_fd = hook->program;
    attr.test.data_in = (uintptr_t)f->byte;
    attr.test.data_size_in = f->length;
    attr.test.repeat = 1;
    attr.test.flags = hook->kind == XDP_LIVE ? BPF_F_TEST_XDP_LIVE_FRAMES : 0;
    attr.test.ctx_in = hook->kind == SKB ? (uintptr_t)&skb : (uintptr_t)&xdp;
    attr.test.ctx_size_in = hook->kind == SKB ? sizeof skb : sizeof xdp;
    if (syscall(SYS_bpf, BPF_PROG_TEST_RUN, &attr, sizeof attr)) {
        hook->outcomes[REFUSED]++;
        return errno == EINVAL ? 0 : -errno; /* newer kernels take no sk_buff that ends within its IP header */
    }
    switch ((int32_t)attr.test.retval) {
    case -1: hook->outcomes[PASSED]++; return 1;
    case 2: hook->outcomes[DROPPED]++; break; /* of XDP: XDP_PASS */
    case 7: hook->outcomes[REDIRECTED]++; break;
    default: hook->outcomes[OTHER]++;
    }
    return 0;
}

/* Makes `count` frames out of `templates` and shows each to some of the hooks, to all at once or at none. The frames that hook 0 passed are
 * kept in `kept`, as many as it takes. Returns how many were kept, or a negative errno. */
int64_t fuzz(uint64_t seed, uint64_t count, const struct frame *templates, uint32_t template_count, struct hook *hooks, uint32_t hook_count,
             struct frame *kept, uint32_t room)
{
    static struct frame f;
    int64_t found = 0;

    state = seed | 1;
    for (uint64_t i = 0; i < count; i++) {
        f = templates[draw(template_count)];
        for (uint32_t n = draw(4); n; n--)
            mutate(&f);
        for (uint32_t h = 0; h < hook_count; h++) {
            if (draw(hooks[h].one_in))
                continue;
            int got = run(&hooks[h], &f);
            if (got < 0)
                return got;
            if (!h && got && found < room)
                kept[found++] = f;
        }
    }
    return found;
}
