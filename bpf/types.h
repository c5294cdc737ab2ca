/* Every struct that programs and Python share, declared here once; Python takes bcc's Key and Leaf of the maps. */

enum pair_state { UNPROTECTED, SYNCING, LOCKSTEP, CHECKPOINTING, PASSTHROUGH, PROMOTED, HALTED };
enum role { ROLE_PRIMARY = 1, ROLE_SECONDARY = 2 };
enum policy { POLICY_PASS, POLICY_COMPARE, POLICY_DROP };

/* One write of 8 bytes changes state and epoch together; times are CLOCK_MONOTONIC's. */
struct pair {
	u32 state;         /* enum pair_state */
	u32 epoch;         /* counts checkpoints; on a secondary it dates the TCP translations */
	u64 deadline_ns;   /* end of the right to speak; 0: no lease */
	u64 open_after_ns; /* the service is gone, and its policy is to go on without protection, once this has passed; 0: to hold */
	u64 zero;          /* always 0, which the verifier doesn't know */
	u32 kept_epoch;    /* on a secondary: TCP numbers learnt in this epoch or later may be true still, the checkpoints since have not committed */
	u32 aliased;    /* the map `aliases` has entries of this pair's NICs */
	u64 compare_timeout_ns; /* a packet unproven for longer asks for a checkpoint; 0: the host's, settings.compare_timeout_ns */
};

/* A guest's NIC on this host, by the ifindex of its vif. */
struct nic {
	u32 id;
	u32 pair;
	u32 role; /* enum role */
	u32 vif;  /* ifindex */
	u32 fwd;  /* ifindex */
	u16 vlan; /* on fwd; 0: fwd is this NIC's alone */
	u8 mac[6]; /* the guest's; all zero: any */
	u8 arp;   /* enum policy, likewise below */
	u8 nd;
	u8 other; /* Ethernet types that are neither IP nor ARP */
	u8 exempts; /* the exemption map has entries for it */
	u32 flags; /* NIC_*: what the loader made and must take away */
	u32 next_vif;   /* on a secondary: from epoch `next_epoch` on the SVM is another VM, behind this ifindex; 0: it stays the same */
	u32 next_epoch;
};

#define NIC_CLSACT_VIF 1u
#define NIC_CLSACT_FWD 2u

struct link_key {
	u32 fwd; /* ifindex */
	u32 vlan;
};

struct settings {
	u32 mark;      /* its upper 12 bits, random and not 0: a released or delivered packet carries them, nothing else can */
	u32 slots, flows, slot_bytes; /* sizes that the maps were made with */
	u32 spare;
	u64 compare_timeout_ns; /* of pairs that have none of their own */
};

/* The keyed hash's secrets, random per boot of the dataplane. */
struct hash_keys {
	u64 stream[STREAM_WORDS + HASH_PAD];
	u64 datagram[DGRAM_WORDS + HASH_PAD];
	u64 fin;
	u64 len;
};

enum kind { KIND_TCP = 1, KIND_UDP, KIND_IP, KIND_FRAGMENT, KIND_FRAME };

/* One direction of a conversation as the guest sends it. */
struct flow_key {
	u16 nic;
	u8 proto;
	u8 kind; /* enum kind */
	u16 guest_port;
	u16 remote_port;
	u16 vlan[2]; /* the guest's own tags, outer first: TAG_PRESENT | TAG_AD | id */
	u32 guest[4]; /* IPv4 as ::ffff:a.b.c.d, network order */
	u32 remote[4];
	u32 extra; /* hash of IPv4 options or IPv6 extension headers, 0 without: output that differs in them is of different flows, and waits */
};

struct flow_ref {
	u32 index;
	u32 generation;
};

/* A slot's record: what P2 holds or P4 parks. Its bytes are in `slab` under the same number. */
struct held {
	u32 next; /* in the flow's list, or NONE */
	u32 flow;
	u64 digest; /* of [from, end), whatever of it is still to be matched */
	u64 since_ns;
	u32 from; /* stream position; datagrams: 0 */
	u32 end;  /* datagrams: length; fragments: end of the byte range */
	u32 start; /* stream position of the first payload byte; fragments: IP identification */
	u32 ack;
	u32 epoch;
	u32 hash; /* the skb's, so that RPS sends it where its siblings went */
	u16 win;
	u16 len;     /* bytes of the frame in the slab */
	u16 l4;      /* offset of the TCP header */
	u16 payload; /* offset of the payload */
	u8 type;     /* enum held_type */
	u8 flags;    /* HELD_* */
	u16 sack;    /* offset of a SACK option, or 0 */
};

enum held_type { HELD_DATA = 1, HELD_SYN, HELD_RST, HELD_ACK, HELD_DATAGRAM, HELD_FRAGMENT };
#define HELD_PROVEN 1u    /* may leave when it is first in its flow */
#define HELD_FIN 2u
#define HELD_LAST 4u      /* fragment without MF: `end` is the datagram's length */
#define HELD_WHOLE 8u     /* all fragments of its datagram are here, `digest` is the datagram's */
#define HELD_DOUBLE 16u   /* fragment that came twice: not counted */
#define HELD_ACKS 32u     /* has the ACK flag: `ack` counts */
#define HELD_SACK_OK 64u  /* SYN with SACK-permitted */

/* Free slots, a handful: what CPUs keep for themselves, and what they exchange. */
struct magazine {
	union {
		u32 count;
		u32 at[MAGAZINE + 1]; /* slots in at[1] to at[count]: an index that the verifier can bound by a mask */
	};
};

struct held_table {
	struct held at[MAX_SLOTS];
};

struct slot {
	u8 byte[SLOT_BYTES + SLOT_PAD];
};

/* A piece of the SVM's stream that is parked behind a hole, without holes of its own. */
struct run {
	u32 from, end; /* equal: none */
	u32 tail;      /* number of its last record */
};

/* All that is known of one flow; everything behind `lock` is read and written under it (bpf/flow.h says what the owner may do without). The CPUs of
 * P2 and P4 pass the first two cache lines of 64 bytes back and forth; what changes seldom is behind them. */
struct flow {
	struct bpf_spin_lock lock;
	u32 generation;
	u32 flags; /* FLOW_* */
	u32 epoch; /* that this flow has been brought to */
	u64 last_ns;
	/* lock-step, on the primary */
	u32 owner;      /* a program is matching and releasing: others only append, and set `work` */
	u32 work;
	u32 p_head, p_tail, p_count; /* PVM packets held, in the PVM's order */
	u32 p_proven;   /* HELD_PROVEN ones of them */
	u32 p_next;     /* TCP: the record that matching is at, or NONE */
	u32 s_head, s_tail, s_count; /* SVM output that is ahead; TCP: by stream position */

	u32 proven;     /* TCP stream: all before it was proven or committed */
	u32 matched;    /* TCP stream: all before it was compared; >= proven */
	u32 p_ack;      /* highest ACK of the PVM that has left, before it was lowered */
	u32 s_ack;      /* highest of the SVM; on the secondary its last one */
	u32 c_ack;      /* highest that the client was sent */
	u16 p_win, s_win, c_win; /* that came with p_seen, s_ack; that the client was sent */
	u16 cell;       /* see forget_here() */
	u32 in_flight;  /* released, not yet seen again at the vif */
	u64 emit_ns;
	u32 emit_cpu;   /* that released last */
	u32 p_urgent;   /* TCP: the last of those in front that the PVM sent again, or NONE */
	u32 p_high;     /* TCP: highest position in the PVM's list */
	u32 p_refused;  /* FLOW_REFUSED: first byte of the PVM's that was */
	u32 hash;       /* of the PVM's last packet, for the owed ACK */
	u32 p_seen;     /* highest ACK of the PVM, of what is held too */

	struct flow_key key;
	u8 guest_mac[6], remote_mac[6];
	u32 frag_first; /* the PVM's datagram whose fragments come now: its first record, or NONE */
	u32 frag_id;    /* its identification */
	u32 s_next;     /* TCP: the SVM's output is here without a hole up to this, if it is above `matched` (bpf/answer.c) */
	u32 s_next_tail; /* number of the record that ends there, if it is still parked: `matched` is below */
	u32 client_ack; /* FLOW_CLIENT: the client's highest ACK, as P1 saw it, with its window and timestamps; on the secondary its last one */
	u32 client_ts_val, client_ts_ecr;
	u32 client_end; /* FLOW_CLIENT_FIN: number behind its FIN */
	u32 client_rst; /* FLOW_CLIENT_RST: number of its reset */
	u16 client_win;
	u16 p_known;    /* `p_seen` is (no bit of `flags`: the verifier would follow what it knows of those) */
	u32 s_ecr;      /* echo in the SVM's packet that brought `s_ack` last: an owed ACK has it, an older one would tell the client of a long way; 0: unknown */
	u32 ts_val, ts_ecr, ts_known; /* of the PVM's packet released last, for the owed ACK; written by the owner or by P2 */
	u32 s_sack[8];  /* edges of the blocks in the SVM's last SACK option, host order; an unused block is 0, 0 */
	struct run s_run[RUNS]; /* FLOW_RUNS: pieces of the SVM's output behind the hole, the newest first */
	u64 syn_digest; /* of the PVM's SYN that was matched last, number `pvm_isn` */
	/* translation, on the secondary: PVM's number = SVM's + delta */
	u32 svm_isn, pvm_isn, client_isn;
	u32 seq_delta, ts_delta;
	u32 svm_ts, pvm_ts;
	u32 svm_high;  /* FLOW_SENT: the SVM has sent data up to this (its own numbers, likewise below) */
	u32 svm_again; /* FLOW_AGAIN: timestamp of what it has sent again last */
	u32 open_sums; /* the PVM leaves this flow's checksums open (SUM_OPEN), as far as could be told; written by P2 */
	u32 s_era;     /* counts the SVM's records that went unused: what is known of the list's records from before is void */
	u32 svm_end;   /* on the secondary, FLOW_FIN: the SVM's own number behind its FIN */
	u32 linger_s;  /* what its end adds to the time that it may be idle, see linger() */
	u32 pad[14]; /* to whole cache lines */
};
#define CACHE_LINE 64
_Static_assert(__builtin_offsetof(struct flow, proven) == CACHE_LINE && __builtin_offsetof(struct flow, key) == 2 * CACHE_LINE, "lines of struct flow");
_Static_assert(sizeof(struct flow) % CACHE_LINE == 0, "struct flow fills its last line");

#define FLOW_LIVE 0x1u
#define FLOW_BASED 0x2u     /* `proven` is known */
#define FLOW_S_ACK 0x4u     /* `s_ack` is known */
#define FLOW_C_ACK 0x8u     /* `c_ack` is known */
#define FLOW_DIVERGED 0x10u /* holds until the next commit */
#define FLOW_FIN 0x40u
#define FLOW_RST 0x80u
#define FLOW_TOLD 0x100u    /* its high water was reported */
#define FLOW_LATE 0x200u    /* its timeout was reported */
#define FLOW_GAP 0x20u      /* in the PVM's list bytes were missing */
#define FLOW_REFILL 0x400u  /* and what fills the hole may be behind it */
#define FLOW_SEEK 0x800u    /* matching looks for that */
#define FLOW_REFUSED 0x100000u /* PVM data found no room: nothing beyond `p_refused` is taken before they come again */
#define FLOW_FRESH 0x200000u /* the base is the first packet that was seen, and nothing is proven yet */
#define FLOW_OPEN 0x1000u   /* handshake seen complete */
#define FLOW_CLIENT 0x400000u  /* `client_ack` is known */
#define FLOW_CLIENT_TS 0x800000u /* and its timestamps */
#define FLOW_CLIENT_RST 0x1000000u
#define FLOW_NO_SACK 0x2000000u /* the guest's SYN has no SACK-permitted */
#define FLOW_RUNS 0x4000000u   /* `s_run` has any */
#define FLOW_DUP 0x8000000u    /* the SVM has repeated its ACK: the client is owed a duplicate, with the SVM's SACK blocks */
/* secondary */
#define FLOW_SVM_ISN 0x2000u
#define FLOW_PVM_ISN 0x4000u
#define FLOW_DELTA 0x8000u
#define FLOW_SVM_TS 0x10000u
#define FLOW_PVM_TS 0x20000u
#define FLOW_CLIENT_FIN 0x40000u
#define FLOW_SENT 0x10000000u
#define FLOW_AGAIN 0x20000000u
#define FLOW_SVM_SYN 0x80000u /* `svm_isn` is the SYN that was matched last */

/* A connection that a guest opened as an SVM, with numbers of its own: the client knows it by those of the PVM of that time, for as long as it lives
 * (bpf/alias.h). All bytes, as each is written by another program, without a lock. */
struct alias {
	u32 seq_delta, ts_delta; /* the client's number = the guest's + delta */
	u32 guest_isn;
	u32 guest_high; /* with `doubt`: the guest's number that the next one is near to, see own_numbers() */
	u64 last_ns;
	u8 guest_fin, client_fin;
	u8 reset; /* by the guest */
	u8 doubt; /* the guest may be a copy of that PVM after all: its next segment tells */
	u32 client_isn;
	u32 again_isn; /* with `again`: of a SYN that the client has said on these ports since, to a PVM that may be another host's */
	u32 again;
};

/* What parse() finds in a frame. */
struct packet {
	struct flow_key key;
	u32 seq, ack; /* TCP */
	u32 frag_id;
	u32 from;     /* fragments: first byte of the range */
	u16 win;
	u16 l3, l4, payload; /* offsets in the frame */
	u16 length;   /* bytes of payload; whole frames: of the frame */
	u16 l4_check; /* offset of the TCP or UDP checksum, or 0 */
	u16 atomic;   /* offset of an IPv6 fragment header around a whole datagram, or 0 */
	u8 class;     /* enum packet_class */
	u8 tcp_flags;
	u8 options;   /* bytes of TCP options */
	u8 more;      /* fragments: MF */
	u8 ip6;
};

/* The fields of a segment that translation changes. */
#define MAX_EDITS 16 /* ack, echo, two for each of 4 SACK blocks: 10; a power of two, so that a mask bounds it */

struct edits {
	u32 count;
	struct {
		u16 off;
		u32 old, new; /* as they stand in the frame */
	} at[MAX_EDITS];
};

/* The PVM's packet that the SVM's proved directly, see release_first(). */
struct release {
	u32 cpu;   /* this one; told beforehand, since under a lock no helper may be called */
	u32 index; /* its slot */
	u32 ack;   /* as it must be lowered */
	u16 win;
	u16 more;  /* there is more to do: this program is now the owner and must drain */
};

/* What P4 found that the SVM should be told in the client's name. */
struct answer {
	u32 what;      /* ANSWER_*; 0: nothing */
	u32 seq;       /* of the answer: what the SVM expects next */
	u32 from, end; /* of the SVM's packet */
	u32 record;    /* where it was parked */
	u32 era;       /* s_era at that moment */
	u32 ts_val, ts_ecr; /* likewise; 0, 0: it has none */
};

#define ANSWER_ACK 1u  /* the client's last ACK again */
#define ANSWER_SYN 2u  /* likewise of the handshake: the SVM's SYN-ACK came again */
#define ANSWER_RST 4u  /* the client's reset again */
#define ANSWER_RUN 8u  /* the packet was parked: is it behind a hole? */
#define ANSWER_OLD 16u /* the packet begins below the client's ACK */

/* A program's own notes. In a map and not on the stack: it would not fit there, and what is read from a map has no history, so the verifier need
 * not follow every way through parse() to the end of the program. */
struct scratch {
	struct packet packet;
	struct flow_ref ref;
	u32 slot, len; /* from P2 to its second half */
	u64 now;       /* from P2's second half and P4 to drain: one reading of the clock a packet */
	u32 magazine;  /* this CPU's free slots, or 0 */
	struct edits edits;
	u32 sack[8]; /* the SVM's blocks, from P4 to the flow and from the flow to drain; or what `answer` tells the SVM */
	struct answer answer;
	u32 cell[8]; /* see forget() */
	struct release release;
	struct held held;
};

/* The peer's heartbeats on fwd (coloebpf/service/beat_frames.py has their form). */
struct fwd_beat {
	u64 expect[2];  /* cookie of the peer's service, as it stands in the frame; 0: none is known */
	u64 cookie[2];  /* of the last one that had it */
	u64 last_ns;    /* when that came, CLOCK_MONOTONIC */
	u64 counter;    /* what it carries */
	u64 strangers;  /* with another cookie */
};

/* What P3 hands to P4, and S1 to its delivery, in the frame's metadata (32 bytes are the kernel's limit). */
struct arrival {
	u64 digest;
	u32 flow; /* or NONE */
	u32 generation;
	u32 from;
	u16 length; /* [from, from + length) is the range */
	u16 nic; /* nic.id */
	u16 l4;
	u16 payload;
	u16 start; /* low bits of the fragment's identification; TCP: offset of a SACK option, or 0 */
	u8 type; /* enum held_type, or ARRIVAL_BEAT */
	u8 flags; /* HELD_FIN, HELD_LAST */
};
#define ARRIVAL_BEAT 255u /* no output, but a frame that starts a walk (let_go() of bpf/upkeep.c) */

struct exempt_key {
	u32 prefixlen; /* bits: 32 for the fields before `remote`, then the prefix's */
	u8 proto;
	u8 nic;       /* nic.id */
	u16 guest_port; /* network order; 0: every port */
	u32 remote[4];
};

enum reason { /* of a divergence */
	REASON_PAYLOAD, REASON_FLAGS, REASON_OPTIONS, REASON_RST, REASON_FIN, REASON_DATAGRAM, REASON_MISSING_SVM, REASON_MISSING_PVM, REASON_STRUCTURE,
	REASONS
};

enum drop { /* why a frame was not taken */
	DROP_NO_SLOT, DROP_FIFO_FULL, DROP_NO_FLOW, DROP_FLOW_RACE, DROP_POLICY, DROP_FOREIGN_MAC, DROP_TOO_LONG, DROP_HALTED, DROP_UNKNOWN_LINK,
	DROP_NO_METADATA, DROP_OLD_EPOCH, DROP_ISOLATED, DROP_SHORT, DROP_STATE, DROP_EMIT, DROP_EARLY_ACK, DROP_BAD_GSO, DROP_CLOSED,
	DROPS
};

enum event_kind { EVENT_DIVERGENCE = 1, EVENT_HIGH_WATER, EVENT_TIMEOUT, EVENT_KICK };

struct event {
	u32 kind; /* enum event_kind */
	u32 reason; /* enum reason; of high water: enum drop that comes next */
	u64 time_ns;
	u32 nic;
	u32 flow;
	u32 epoch;
	u32 offset; /* stream position; datagrams: length */
	u64 pvm_digest;
	u64 svm_digest;
	struct flow_key key;
};

struct counters {
	u64 mirrored_packets, mirrored_bytes;   /* P1: client frames copied to fwd */
	u64 output_packets, output_bytes;       /* P2: frames the guest sent (a super-packet is one) */
	u64 segments;                           /* P2: wire-sized packets in them that were compared */
	u64 compared_packets, compared_bytes;   /* proven by the SVM's output; bytes of payload */
	u64 released_packets, released_bytes;   /* that left for the client after proof or commit */
	u64 released_unchanged;                 /* of them: passed P2 without being held */
	u64 committed_packets;                  /* of them: by a commit, not by proof */
	u64 reentered;                          /* seen again at the vif after their release */
	u64 held_packets, unheld_packets;       /* into the FIFOs, and out */
	u64 retransmissions;                    /* PVM's, of proven bytes */
	u64 policy_passed, exempt, unprotected; /* left uncompared: policy, exemption, state of the pair */
	u64 lowered;                            /* released with a lower ACK or window than the PVM's */
	u64 owed_acks;
	u64 svm_packets, svm_bytes;             /* P4: SVM output that arrived */
	u64 svm_parked, svm_unparked;           /* kept because ahead, and no longer */
	u64 svm_swallowed;                      /* told nothing new */
	u64 delivered, translated;              /* S1; S1, S2, S3, and P1, P2 for aliases */
	u64 svm_output;                         /* S2: to fwd or bridge */
	u64 divergences[16];                    /* by enum reason */
	u64 dropped[32];                        /* by enum drop */
	u64 events_lost;                        /* ring buffer full */
	u64 timeouts, high_waters, kicks;
	u64 partial;                            /* matched parts of held packets that left early (bpf/partial.c) */
	u64 answers;                            /* P4: ACKs and resets sent to the SVM in the client's name (bpf/answer.c) */
};

struct histogram {
	u64 bucket[64]; /* bucket i: holding times of [2^i, 2^(i+1)) ns */
};
