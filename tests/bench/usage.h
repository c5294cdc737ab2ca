/* SPDX-License-Identifier: GPL-2.0 */
/* The clock, and the CPU time of the machine and of this process. */
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "port.h"

static inline double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

/* Seconds; `user` and `busy` are all CPUs', `own` this process's. */
struct usage { double at, busy, user, own, own_user; uint64_t got; };

static inline struct usage usage_mark(uint64_t got)
{
    unsigned long long user, nice, system, idle, iowait, irq, softirq, steal;
    double tick = 1.0 / sysconf(_SC_CLK_TCK);
    struct usage u = { .got = got };
    struct rusage r;
    FILE *f;

    mark();
    u.at = now();
    f = fopen("/proc/stat", "r");
    if (!f || fscanf(f, "cpu %llu %llu %llu %llu %llu %llu %llu %llu", &user, &nice, &system, &idle, &iowait, &irq,
                     &softirq, &steal) != 8)
        fail("/proc/stat");
    fclose(f);
    getrusage(RUSAGE_SELF, &r);
    u.busy = (user + nice + system + irq + softirq) * tick;
    u.user = (user + nice) * tick;
    u.own_user = r.ru_utime.tv_sec + r.ru_utime.tv_usec * 1e-6;
    u.own = u.own_user + r.ru_stime.tv_sec + r.ru_stime.tv_usec * 1e-6;
    return u;
}
