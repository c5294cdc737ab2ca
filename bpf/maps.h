#define ALIGNED 1024 /* BPF_F_MMAPABLE: the values of an array begin at a page, so that records keep to their cache lines */

/* A table of one value with long arrays. bcc writes scan and print code for each element of a leaf, which takes clang many seconds, so it is shown a
 * row of bytes; bpftool and the programs see the real type. `bytes` must be a plain number: bcc's description of the map breaks on sizeof. */
#define BIG_TABLE_PINNED(type, name, bytes) \
	_Static_assert(sizeof(type) == (bytes), #name); \
	struct name##_bytes { \
		char byte[bytes]; \
	}; \
	struct name##_table_t { \
		u32 key; \
		struct name##_bytes leaf; \
		type *(*lookup)(u32 *); \
		u32 max_entries; \
		int flags; \
	}; \
	__attribute__((section("maps/array:" PIN_DIR "/" #name))) struct name##_table_t name = {.max_entries = 1, .flags = ALIGNED}; \
	BPF_ANNOTATE_KV_PAIR(name, u32, type)
#ifndef HASH_KEYS_BYTES
#define HASH_KEYS_BYTES 135696 /* (512 + 32 + 16384 + 32 + 2) * 8 */
#endif
#ifndef HELD_BYTES
#define HELD_BYTES 4194304 /* MAX_SLOTS * 64 */
#endif

/* The maps, all pinned under PIN_DIR. Behind each: who writes it, who reads it. */

BPF_TABLE_PINNED("array", u32, struct settings, settings, 1, PIN_DIR "/settings");          /* loader -> all programs */
BIG_TABLE_PINNED(struct hash_keys, hash_keys, HASH_KEYS_BYTES);       /* loader -> P2, P3, drain */
BPF_TABLE_PINNED("array", u32, struct pair, pairs, MAX_PAIRS, PIN_DIR "/pairs", ALIGNED);            /* control -> all programs (mmap'ed: written by plain stores of 8 bytes) */
BPF_TABLE_PINNED("hash", u32, struct nic, nics, 2 * MAX_NICS, PIN_DIR "/nics");                 /* loader -> vif hooks, by ifindex of the vif */
BPF_TABLE_PINNED("array", u32, u32, vif_hints, VIF_HINTS, PIN_DIR "/vif_hints");            /* vif hooks: nic.id by ifindex, where it was last */
BPF_TABLE_PINNED("array", u32, struct nic, nic_by_id, MAX_NICS, PIN_DIR "/nic_by_id");      /* loader -> fwd hooks, drain */
BPF_TABLE_PINNED("array", u32, struct fwd_beat, fwd_beats, MAX_NICS, PIN_DIR "/fwd_beats"); /* control: cookies; XDP on fwd: the rest -> control */
BPF_TABLE_PINNED("hash", struct link_key, u32, links, MAX_LINKS, PIN_DIR "/links");         /* loader -> XDP on fwd: which NIC (nic.id) */
BPF_TABLE_PINNED("array", u32, u64, walks, MAX_NICS, PIN_DIR "/walks");                     /* P2, XDP on fwd: when the last walk without a service began */
BPF_TABLE_PINNED("hash", struct flow_key, struct flow_ref, flow_refs, MAX_FLOWS, PIN_DIR "/flow_refs"); /* P2, P3, S1, S2 -> the same; sweep */
BPF_TABLE_PINNED("array", u32, struct flow, flows, MAX_FLOWS, PIN_DIR "/flows", ALIGNED);            /* all programs, under each flow's lock */
BIG_TABLE_PINNED(struct held_table, held, HELD_BYTES);                /* P2, P4, drain: under the flow's lock that a slot is linked in */
BPF_TABLE_PINNED("array", u32, struct slot, slab, MAX_SLOTS, PIN_DIR "/slab", ALIGNED);              /* P2, P4 -> drain; whoever took the slot */
BPF_TABLE_PINNED("array", u32, struct magazine, magazines, MAX_MAGAZINES, PIN_DIR "/magazines", ALIGNED); /* loader fills; who took its number off a stack */
BPF_QUEUESTACK_PINNED("stack", full_magazines, u32, MAX_MAGAZINES, 0, PIN_DIR "/full_magazines");   /* loader fills; P2, P4, drain take and give */
BPF_QUEUESTACK_PINNED("stack", empty_magazines, u32, MAX_MAGAZINES, 0, PIN_DIR "/empty_magazines"); /* likewise */
BPF_QUEUESTACK_PINNED("stack", free_flows, u32, MAX_FLOWS, 0, PIN_DIR "/free_flows");       /* loader fills; whoever makes or ends a flow */
BPF_TABLE_PINNED("lpm_trie", struct exempt_key, u32, exempt, 1024, PIN_DIR "/exempt", 1);   /* control -> P2, P3 (flag 1: BPF_F_NO_PREALLOC, a trie's must) */
BPF_TABLE_PINNED("hash", struct flow_key, struct alias, aliases, MAX_FLOWS, PIN_DIR "/aliases", 1);    /* upkeep, control -> P1, P2, S1, S2, S3; not preallocated, it is empty as a rule */
BPF_TABLE_PINNED("percpu_array", u32, struct counters, counters, MAX_NICS, PIN_DIR "/counters");    /* all programs -> control */
BPF_TABLE_PINNED("percpu_array", u32, struct histogram, holding, MAX_NICS, PIN_DIR "/holding");     /* P2, drain -> control */
BPF_TABLE_PINNED("percpu_array", u32, struct scratch, scratch, 2, PIN_DIR "/scratch");               /* each program for itself, for the length of one run */
BPF_TABLE_PINNED("array", u32, u64, gauges, 8, PIN_DIR "/gauges");                          /* atomic adds by programs -> control; GAUGE_* */
BPF_TABLE_PINNED("prog", u32, u32, tc_stages, 16, PIN_DIR "/tc_stages");                     /* loader -> tail calls of tc programs; STAGE_* */
BPF_TABLE_PINNED("prog", u32, u32, xdp_stages, 4, PIN_DIR "/xdp_stages");                   /* loader -> tail calls of XDP programs */

#define GAUGE_SLOTS_USED 0 /* those not in full_magazines: what CPUs keep counts as used */
#define GAUGE_FLOWS_USED 1
#define GAUGE_FLOW_TOP 2  /* one more than the highest flow number ever used: bounds the sweep */
#define GAUGE_HAND 3      /* where the search for idle flows goes on */
#define GAUGE_LOW_TOLD 4  /* the slab's high water was reported: 1 until it falls */

#define STAGE_DRAIN 0
#define STAGE_SPLIT 1
#define STAGE_P4 2
#define STAGE_S1 3
#define STAGE_PASS 4
#define STAGE_HOLD 5
#define STAGE_SPLIT_UDP 6
#define STAGE_PARTIAL 7
#define STAGE_P4_DATAGRAM 8
#define STAGE_ANSWER 9
#define STAGE_LET_GO 10
#define STAGE_P1_ALIAS 11
#define STAGE_P2_ALIAS 12
#define STAGE_P3 0 /* in xdp_stages */
#define STAGE_S1_XDP 1

BPF_TABLE_PINNED("array", u32, struct event, last_events, 8, PIN_DIR "/last_events");       /* tell() -> bpftool: the last of each kind */

/* bcc has no macro for a pinned ring buffer; this is BPF_RINGBUF_OUTPUT with the path in the section's name. */
struct _events_table_t {
	int key;
	u32 leaf;
	int (*ringbuf_output)(void *, u64, u64);
	void *(*ringbuf_reserve)(u64);
	void (*ringbuf_discard)(void *, u64);
	void (*ringbuf_submit)(void *, u64);
	u32 max_entries;
};
__attribute__((section("maps/ringbuf:" PIN_DIR "/events"))) struct _events_table_t events = {.max_entries = 1 << 20}; /* programs -> control */
