/* The dataplane of one host, whole. Which program runs where: bpf/link.c, bpf/primary.c, bpf/prove.c, bpf/secondary.c; bpf/drain.c releases. */
#include <uapi/linux/bpf.h>
#include <uapi/linux/in.h>
#include <uapi/linux/in6.h>

#include "constants.h"
#include "types.h"
#include "maps.h"
#include "view.h"
#include "hash.h"
#include "parse.h"
#include "frame.h"
#include "flow.h"
#include "stream.h"
#include "datagram.h"
#include "describe.h"
#include "vessel.h"
#include "translate.h"
#include "drain.c"
#include "partial.c"
#include "answer.c"
#include "primary.c"
#include "prove.c"
#include "split.c"
#include "link.c"
#include "secondary.c"
#include "upkeep.c"
