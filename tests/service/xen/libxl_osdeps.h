/* Stands in for Xen's own: the harness builds on Linux only. */
#define _GNU_SOURCE
