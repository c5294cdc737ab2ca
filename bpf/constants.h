/* Limits, names and numbers of the dataplane. Each has its unit and its reason; the loader may override what is in #ifndef. */

#define MAX_NICS 64u   /* guest NICs a host carries; small, every map of theirs is an array */
#define VIF_HINTS 256u /* power of two: ifindexes of a few dozen vifs seldom share one */
#define MAX_PAIRS 64u  /* protected guests a host takes part in */
#define MAX_LINKS 128u /* (device, VLAN) of forward links; two tries per NIC leave room */

#ifndef SLOT_SHIFT
#define SLOT_SHIFT 11 /* 2 KiB: an MTU of 1,500, two VLAN tags and the Ethernet header fit; 14 for 9,000 */
#endif
#define SLOT_BYTES (1u << SLOT_SHIFT)
#define SLOT_PAD 512u /* behind the slot's bytes: a helper that reads 512 bytes from anywhere inside stays inside */
#define MAX_FRAME 0x7fffu /* bytes of a frame that are ever looked at; power of two less one, the verifier's limit is 0xffff */
#ifndef MAX_SLOTS
#define MAX_SLOTS 65536u /* power of two; 65,536 records of 64 bytes are the 4 MiB that one map value may have */
#endif
#ifndef MAX_FLOWS
#define MAX_FLOWS 65536u /* power of two, at most 2^20: a flow's number shares skb->mark with a secret of 12 bits */
#endif
#define FLOW_MASK 0xfffffu /* of skb->mark: a flow's number; the other bits are the secret of settings.mark */
#ifndef MAGAZINE
#define MAGAZINE 15 /* free slots that a CPU takes or gives back at once: with their number a cache line of 64 bytes. One less than a power of two; 1 for small slabs */
#endif
#define SPARE_MAGAZINES 1024 /* empty ones: two for each of 256 CPUs, and as many on their way between two stacks */
#define MAX_MAGAZINES (1 + (MAX_SLOTS + MAGAZINE - 1) / MAGAZINE + SPARE_MAGAZINES) /* number 0 is none */
#define SCRATCH_HOOK 0u /* in the map scratch: programs on hooks */
#define SCRATCH_USER 1u /* run by user space, which before 6.2 a hook's program may interrupt on the same CPU */
#define NONE 0xffffffffu /* no slot, no flow */

#define MAX_FIFO (MAX_SLOTS / 8) /* records a flow may hold or park a side: 11 MB at the usual size, more than a peer's window */
#define FIFO_SPARE 64u     /* above MAX_FIFO, for the SVM's record that all the others wait for */
#define SLOTS_SPARE (MAX_SLOTS / 8) /* the slab's last ones, for records that others of their flow wait for */
#define WALK 128           /* records that a search in a list looks at: what the verifier can follow (a million instructions a program) */
#define FIFO_HIGH (MAX_FIFO - MAX_FIFO / 4)     /* a flow asks for a checkpoint from here on: three quarters leave time for one */
#define SLOTS_LOW (MAX_SLOTS / 4) /* the slab asks for a checkpoint when no more than these are free */
#ifndef DRAIN_STEPS
#define DRAIN_STEPS 8      /* steps of one drain run (again what the verifier can follow); it tail-calls itself */
#endif
#define TAIL_CALLS 33      /* that one run may make: MAX_TAIL_CALL_CNT of linux/bpf.h (kernel) */
#define RUNS 4             /* pieces of the SVM's stream behind holes that a flow remembers; an ACK has room for three */
#define MAX_SEGMENTS 66    /* of a super-packet; 64 KiB of an MSS of 1,220 (IPv6's least) are 54 */
#ifndef GSO_BATCH
#define GSO_BATCH 2        /* segments of one split run, likewise */
#endif

#define GSO_BATCH_UDP (GSO_BATCH > 1 ? 2 : 1) /* the search for equal datagrams takes more */

/* Keys of the hash, one for each 4 bytes: no two positions of a range that is compared in one go may share one. */
#ifndef STREAM_WORDS
#define STREAM_WORDS 512u /* TCP: 2 KiB of stream, more than any segment; 4 KiB of keys stay in the L1 cache. 4096 for 9,000 */
#endif
#define DGRAM_WORDS 16384u /* datagrams reach 64 KiB */
#define HASH_PAD 32u       /* the first keys again behind the last, so that a round is read without a wrap */
#ifndef HASH_ROUNDS
#define HASH_ROUNDS 12u    /* of 128 bytes: the longest frame, 1,522 */
#endif
#define EMIT_STALE_NS 500000000ull /* half a second: a released packet that has not come back through the vif by then was dropped by the stack */
#define WALK_PAUSE_NS 1000000000ull /* a second: from one walk without a service to the next (let_go() of bpf/upkeep.c) */
#define MS 1000000ull
#define SEC 1000000000ull
#define IDLE_CLOSED (10 * SEC)    /* connection that ended: long enough for a retransmitted FIN */
#define LINGER_S 120 /* for so much longer one that the SVM opened, and whose client has not acknowledged all: TCP_RTO_MAX of linux/tcp.h (kernel) */
#define IDLE_HALF_OPEN (60 * SEC) /* handshake never finished: longer than the SYN's retransmissions are apart */
#define IDLE_TCP (432000 * SEC)   /* established: five days, as conntrack has it; longer than the two hours between keep-alives */
#define IDLE_ALIAS (300 * SEC)    /* an alias whose connection has ended: two retransmissions that are TCP_RTO_MAX apart, and a fencing in between */
#define IDLE_OTHER (30 * SEC)     /* datagrams: as conntrack has it */

/* frames */
#define ETH_P_8021Q_ 0x8100
#define ETH_P_8021AD_ 0x88a8
#define ETH_P_IP_ 0x0800
#define ETH_P_IPV6_ 0x86dd
#define ETH_P_ARP_ 0x0806
#define ETH_P_BEAT 0x88b5 /* IEEE 802: local experimental Ethertype 1 */
#define BEAT_MAGIC 0x434f4c4f /* "COLO" */
#define BEAT_VERSION 1
#define TAG_PRESENT 0x1000u /* in flow_key.vlan: a tag is there; the bit is DEI's place, which is not compared */
#define TAG_AD 0x8000u      /* in flow_key.vlan: it is an 802.1ad tag */
#define MAX_EXT 6           /* IPv6 extension headers that are followed; RFC 8200 orders at most 6 different ones */
#define MAX_OPTIONS 16 /* TCP options, NOPs counted, that are walked: 40 bytes hold more only if most are NOPs */
#define STAMPS 0x0101080au /* NOP NOP timestamps: all the options that nearly every segment carries */
#define STAMPS_LEN 12
#define SACK_HEAD 0x01010502u /* NOP NOP SACK, and its length without blocks */
#define TCP_FIN 0x01u
#define TCP_SYN 0x02u
#define TCP_RST 0x04u
#define TCP_PSH 0x08u
#define TCP_ACK 0x10u
#define TCP_URG 0x20u

/* __sk_buff verdicts */
#define VERDICT_PASS (-1) /* TC_ACT_UNSPEC: the next filter, the bridge */
#define VERDICT_DROP 2    /* TC_ACT_SHOT */
