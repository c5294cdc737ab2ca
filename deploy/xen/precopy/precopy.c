/* Keeps the pre-copy of a live migration going until it is told to end. Preloaded into the save helper of Xen 4.17's libxl
 * (LD_PRELOAD): libxl gives xc_domain_save() no policy, and libxenguest's own stops the guest after five rounds.
 *
 * COLOEBPF_HOLD is a path; coloebpf/xen/hold.py makes files with its name and an end:
 *     .go    stop the guest, and send its rest
 *     .end   end without having stopped it
 * Until then rounds follow each other, with a pause as long as the round took between them, of ROUND_MS at least: the link
 * and this host have half of their time for others. Without COLOEBPF_HOLD nothing is changed, nor if who has started the
 * helper is gone: then it ends.
 *
 * Rests on struct precopy_stats, struct save_callbacks and the order of calls in send_memory_live() (tools/libs/guest/
 * xg_sr_save.c) of Xen 4.17: once before a round's pages are sent, with their number, and once behind them, with -1.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
#include <xenctrl.h>
#include <xenguest.h>

#define ROUND_MS 500 /* what a request has to send at most is what the guest has written in this time, and one look */
#define LOOK_MS 5    /* between two looks for the files */

static const char *hold;
static pid_t libxl; /* whoever has started the helper */
static long round_began_ms;

static long now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static bool said(const char *end)
{
    char path[4096];

    snprintf(path, sizeof path, "%s%s", hold, end);
    return access(path, F_OK) == 0;
}

static bool over(void)
{
    return said(".end") || getppid() != libxl;
}

static int policy(struct precopy_stats stats, void *data)
{
    long pause, until;

    (void)data;
    if (over())
        return XGS_POLICY_ABORT;
    if (stats.dirty_count >= 0) { /* a round's pages are to be sent */
        round_began_ms = now_ms();
        /* The first round is all the memory. Any other is sent while the guest runs, and then it is stopped. */
        return stats.iteration && said(".go") ? XGS_POLICY_STOP_AND_COPY : XGS_POLICY_CONTINUE_PRECOPY;
    }
    pause = now_ms() - round_began_ms;
    until = now_ms() + (pause > ROUND_MS ? pause : ROUND_MS);
    while (now_ms() < until && !said(".go") && !over())
        usleep(LOOK_MS * 1000);
    return over() ? XGS_POLICY_ABORT : XGS_POLICY_CONTINUE_PRECOPY;
}

int xc_domain_save(xc_interface *xch, int io_fd, uint32_t dom, uint32_t flags, struct save_callbacks *callbacks,
                   xc_stream_type_t stream_type, int recv_fd)
{
    int (*real)(xc_interface *, int, uint32_t, uint32_t, struct save_callbacks *, xc_stream_type_t, int) =
        dlsym(RTLD_NEXT, "xc_domain_save");

    hold = getenv("COLOEBPF_HOLD");
    libxl = getppid();
    if (hold && (flags & XCFLAGS_LIVE))
        callbacks->precopy_policy = policy;
    return real(xch, io_fd, dom, flags, callbacks, stream_type, recv_fd);
}
