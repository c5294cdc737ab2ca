/* Stands in for Xen's own: as much of libxl as libxl_colo_proxy.c and libxl_colo.h need to compile. */
#ifndef LIBXL_INTERNAL_H
#define LIBXL_INTERNAL_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <unistd.h>

#define ERROR_FAIL (-3)
#define NOGC NULL

/* The types that libxl_colo.h has as members or parameters; nobody looks into them. */
typedef struct libxl__ao { int domid; } libxl__ao;
typedef struct libxl__egc { int unused; } libxl__egc;
typedef struct libxl__ev_child { int unused; } libxl__ev_child;
typedef struct libxl__stream_read_state { int unused; } libxl__stream_read_state;
struct libxl__checkpoint_devices_state;
typedef void libxl__domain_create_cb(void);
typedef struct libxl__colo_proxy_state libxl__colo_proxy_state;
typedef struct libxl__colo_save_state libxl__colo_save_state;
typedef struct libxl__colo_restore_state libxl__colo_restore_state;

#include "libxl_colo.h"

#define STATE_AO_GC(op_ao) libxl__ao *ao __attribute__((unused)) = (op_ao)
#define LOGD(level, domid, format, ...) fprintf(stderr, #level " " format "\n", ##__VA_ARGS__)
#define LOGED LOGD
#define libxl__malloc(gc, size) malloc(size)
#define libxl__realloc(gc, old, size) realloc(old, size)

#endif
