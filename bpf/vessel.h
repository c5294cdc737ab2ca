/* Sending a held packet: some packet's own sk_buff is the vessel, it is overwritten with the held bytes and goes back into the vif, marked. */

#define MODE_CLONE_FIRST 1u /* the vessel is itself a released packet: it goes first, as a clone */
#define MODE_NO_REDIRECT 2u /* run by BPF_PROG_TEST_RUN, which does not act on a redirect verdict: every packet goes as a clone */
#define MODE_RELEASE 8u     /* this run of drain sends before it matches on */
#define MODE_PARTIAL 4u     /* the vessel's checksum is still to be filled in by the kernel (CHECKSUM_PARTIAL): what it carries must want the same */

static __always_inline u16 fold(u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

/* One's complement sum of the pseudo-header; lengths and protocol in network order as they stand there. */
static __always_inline u64 pseudo_sum(const struct flow_key *key, u32 l4_len)
{
	u64 sum = bpf_htons(l4_len & 0xffff) + bpf_htons(key->proto);
	bool ip4 = key->guest[2] == bpf_htonl(0xffff) && !key->guest[0] && !key->guest[1];
#pragma unroll
	for (int i = 0; i < 4; i++)
		if (!ip4 || i == 3)
			sum += (u64)key->guest[i] + key->remote[i];
	return sum;
}

/* Checksum update, RFC 1624: `sum` is HC as it stands in the packet. */
static __always_inline u16 sum_replace(u16 sum, u32 old, u32 new)
{
	u64 s = (u16)~sum;
	s += (u64)(u32)~old + new;
	return ~fold(s);
}

/* Sum of `len` bytes at `off` of a slot. The caller has zeroed 4 bytes behind them. (bpf_csum_diff() gives all 32 bits on older kernels, and bcc
 * declares it an int: without the cast half of the sums would be negative. It fails only for lengths that are not asked for here.) */
static __always_inline u64 slot_sum(struct slot *slot, u32 off, u32 len)
{
	u64 sum = 0;
#pragma nounroll
	for (int i = 0; i < SLOT_BYTES / 512; i++) { /* bpf_csum_diff() takes 512 bytes at most */
		if (len < 509 || off > SLOT_BYTES - 512) /* 509 to 511 are 512 by fours */
			break;
		BOUND(off, SLOT_BYTES - 1);
		sum += (u32)bpf_csum_diff(NULL, 0, (void *)(slot->byte + off), 512, 0);
		off += 512;
		len = len > 512 ? len - 512 : 0;
	}
	BOUND(off, SLOT_BYTES - 1);
	len = (len + 3) & ~3u;
	BOUND(len, 0x1fc);
	if (len)
		sum += (u32)bpf_csum_diff(NULL, 0, (void *)(slot->byte + off), len, 0);
	return sum;
}

/* Writes the lower ACK and window into the held packet. */
static __always_inline void lower(struct slot *slot, const struct held *h, u32 ack, u16 win)
{
	u32 off = h->l4;
	if (off > SLOT_BYTES - 64)
		return;
	BOUND(off, SLOT_BYTES - 1);
	u8 *tcp = slot->byte + off;
	u16 sum = *(u16 *)(tcp + 16);
	sum = sum_replace(sum, bpf_htonl(h->ack), bpf_htonl(ack));
	sum = sum_replace(sum, bpf_htons(h->win), bpf_htons(win));
	*(u32 *)(tcp + 8) = bpf_htonl(ack);
	*(u16 *)(tcp + 14) = bpf_htons(win);
	*(u16 *)(tcp + 16) = sum;
}

/* Keeps the timestamps of a packet that leaves. */
static __always_inline void note_timestamps(struct flow *f, const struct slot *slot, const struct held *h)
{
	u32 o = h->l4 + 20;
	bool there = h->payload >= o + 12 && o <= SLOT_BYTES - 64;
	BOUND(o, SLOT_BYTES - 1);
	if (there && *(u32 *)(slot->byte + o) == bpf_htonl(STAMPS)) {
		u32 val = be32_at(slot->byte + o + 4), ecr = be32_at(slot->byte + o + 8);
		if (f->ts_val != val || f->ts_ecr != ecr || !f->ts_known) { /* written only if new: the line is the other CPU's too */
			f->ts_val = val;
			f->ts_ecr = ecr;
			f->ts_known = 1;
		}
	}
}

#define TAG_GENERATION 0x3fffu
#define TAG_WALK 0x4000u /* no released packet: its mark has the flow's number at which let_go() goes on */
#define TAG_OPEN_SUM 0x8000u /* its checksum is still to be filled in by the kernel: what uses it as a vessel needs MODE_PARTIAL */

/* A released packet carries its flow's number through the backlog in the mark, beside the bits that no other packet has, and some bits of the flow's
 * generation in tc_index. (skb->priority would not survive: dev_forward_skb() clears it.) */
static __always_inline void put_tag(struct __sk_buff *skb, const struct place *at, u32 index, u32 generation, bool open_sum)
{
	skb->mark = (at->set->mark & ~FLOW_MASK) | (index & FLOW_MASK);
	skb->tc_index = (generation & TAG_GENERATION) | (open_sum ? TAG_OPEN_SUM : 0);
}

/* A clone of `skb` goes into the vif, where let_go() goes on with flow `next`. */
static __always_inline void send_walk(struct __sk_buff *skb, const struct place *at, u32 next)
{
	skb->mark = (at->set->mark & ~FLOW_MASK) | (next & FLOW_MASK);
	skb->tc_index = TAG_WALK;
	if (bpf_clone_redirect(skb, at->nic->vif, BPF_F_INGRESS))
		drop(at, DROP_EMIT);
	skb->mark = 0;
	skb->tc_index = 0;
}

/* Blanks out the PVM's SACK option if the SVM has not reported, or acknowledged, all of its blocks: the client takes them for received and would not
 * send again what the SVM lacks (promise 2). */
static __always_inline bool blank_sack(struct slot *slot, const struct held *h, const struct scratch *notes, const struct flow_key *key, u32 s_ack)
{
	u32 off = h->sack, l4 = h->l4;
	u32 l4_len = h->payload - l4 + (h->type == HELD_DATA ? h->end - h->start - !!(h->flags & HELD_FIN) : 0);
	bool known = true;

	if (h->type != HELD_DATA && h->type != HELD_ACK) /* no SYN's, no RST's: nobody reads it there, and their data are not counted here */
		return false;
	if (off > SLOT_BYTES - 64 || l4 > SLOT_BYTES - 64 || l4 + l4_len > SLOT_BYTES - 64)
		return false;
	BOUND(off, SLOT_BYTES - 1);
	BOUND(l4, SLOT_BYTES - 1);
	u8 *o = slot->byte + off;
	u32 len = o[1];
#pragma nounroll
	for (u32 i = 0; i < 4; i++) {
		if (2 + 8 * (i + 1) > len)
			break;
		u32 left = be32_at(o + 2 + 8 * i), right = be32_at(o + 6 + 8 * i);
		bool has = seq_le(right, s_ack);
#pragma unroll
		for (int b = 0; b < 8; b += 2)
			has |= notes->sack[b] != notes->sack[b + 1] && seq_le(notes->sack[b], left) && seq_le(right, notes->sack[b + 1]);
		known &= has;
	}
	if (known)
		return false;
#pragma unroll
	for (u32 i = 0; i < 40; i++) /* all that options may be; unrolled, as clang's loop counts in a way that kernel 6.1 can't follow */
		if (i < len)
			((volatile u8 *)o)[i] = 1; /* NOP; volatile, or clang calls memset() */
	u8 *tcp = slot->byte + l4;
	*(u16 *)(tcp + 16) = 0;
	u32 end = l4 + l4_len;
	BOUND(end, SLOT_BYTES - 1);
	*(u32 *)(slot->byte + end) = 0;
	u64 sum = slot_sum(slot, l4, l4_len) + pseudo_sum(key, l4_len);
	*(u16 *)(tcp + 16) = ~fold(sum);
	return true;
}

/* What a vessel carries beside its bytes. */
static __always_inline void dress(struct __sk_buff *skb, const struct place *at, const struct held *h, u32 index, u32 generation)
{
	put_tag(skb, at, index, generation, false);
	bpf_set_hash(skb, h->hash);
}

/* Counts a held packet that leaves, and how long it waited. */
static __always_inline void count_release(const struct place *at, struct histogram *waited, const struct held *h, u64 now)
{
	u64 ns = (s64)(now - h->since_ns) > 0 ? now - h->since_ns : 0, log = 0; /* the clock was read before the lock was had */
#pragma unroll
	for (int s = 5; s >= 0; s--) /* log2 */
		if (ns >> (1u << s)) {
			ns >>= 1u << s;
			log += 1u << s;
		}
	waited->bucket[log & 63]++;
	at->count->unheld_packets++;
	at->count->released_packets++;
	at->count->released_bytes += h->len;
}

#define BESIDE 1u      /* the outer tag goes where the vessel's was, beside the packet: the kernel will add a checksum at an offset that does not count it */
#define BESIDE_KEPT 2u /* likewise, and there is one inside. The vessel keeps its own (of the same flow, so of the same VLAN): popping it would bring the
			* inner one up, and move all that follows away from that offset */

/* Overwrites `skb` with slot `slot`. `beside`: BESIDE*, or 0. */
static __always_inline bool load_vessel(struct __sk_buff *skb, const struct place *at, struct slot *slot, const struct held *h, u32 index,
					u32 generation, u32 beside)
{
	u32 len = h->len;
	if (skb->vlan_present && beside != BESIDE_KEPT) {
		u16 end = bpf_htons(ETH_P_IP_);
		bpf_skb_store_bytes(skb, 16, &end, 2, 0); /* so that no more than one tag behind this one comes up */
		bpf_skb_vlan_pop(skb);
		if (skb->vlan_present) /* popping moved an inner tag there */
			bpf_skb_vlan_pop(skb);
	}
	if (beside) {
		if (len < 32 || bpf_skb_change_tail(skb, len - 4, 0) || bpf_skb_store_bytes(skb, 0, slot->byte, 12, 0))
			return false;
		len -= 32;
		BOUND(len, SLOT_BYTES - 1);
		len += 16;
		if (bpf_skb_store_bytes(skb, 12, slot->byte + 16, len, 0))
			return false;
		if (beside != BESIDE_KEPT && bpf_skb_vlan_push(skb, *(u16 *)(slot->byte + 12), be16_at(slot->byte + 14)))
			return false;
		goto loaded;
	}
	if (len < 14 || bpf_skb_change_tail(skb, len, 0))
		return false;
	len -= 14; /* never zero: the helper's demand */
	BOUND(len, SLOT_BYTES - 1);
	len += 14;
	if ( bpf_skb_store_bytes(skb, 0, slot->byte, len, 0))
		return false;
loaded:
	dress(skb, at, h, index, generation);
	return true;
}

/* What build_ack() writes. */
struct ack_fields {
	u32 seq, ack, ts_val, ts_ecr;
	u16 win;
	u8 flags; /* of TCP */
	bool stamped;
};

#define ACK_BLOCKS 3u /* beside timestamps the options have room for three */

/* An ACK that no packet of the guest's carried: built from what the flow knows, from the guest to the client. With the SACK blocks in `notes->sack`:
 * the first `blocks` pairs, host order. */
static __always_inline void build_ack(struct slot *slot, struct held *h, const struct flow_key *key, const u8 *macs, const struct ack_fields *is,
				      struct scratch *notes, u32 blocks)
{
	bool ip4 = key->guest[2] == bpf_htonl(0xffff) && !key->guest[0] && !key->guest[1];
	u8 *b = slot->byte;
	u32 off = 12, head = 20 + (is->stamped ? STAMPS_LEN : 0);
	u32 all = head + (blocks ? 4 + 8 * blocks : 0);

	__builtin_memcpy(b, macs + 6, 6);
	__builtin_memcpy(b + 6, macs, 6);
#pragma unroll
	for (int i = 0; i < 2; i++) {
		if (key->vlan[i] & TAG_PRESENT) {
			*(u16 *)(b + off) = bpf_htons(key->vlan[i] & TAG_AD ? ETH_P_8021AD_ : ETH_P_8021Q_);
			*(u16 *)(b + off + 2) = bpf_htons(key->vlan[i] & 0xfff);
			off += 4;
		}
	}
	*(u16 *)(b + off) = bpf_htons(ip4 ? ETH_P_IP_ : ETH_P_IPV6_);
	off += 2;
	u8 *ip = b + off;
	if (ip4) {
		*(u32 *)ip = bpf_htonl(0x45000000 | (20 + all));
		*(u32 *)(ip + 4) = bpf_htonl(0x00004000); /* no identification, DF */
		*(u32 *)(ip + 8) = bpf_htonl(64 << 24 | IPPROTO_TCP << 16);
		*(u32 *)(ip + 12) = key->guest[3];
		*(u32 *)(ip + 16) = key->remote[3];
		u64 sum = 0;
#pragma unroll
		for (int i = 0; i < 5; i++)
			sum += *(u32 *)(ip + 4 * i);
		*(u16 *)(ip + 10) = ~fold(sum);
		off += 20;
	} else {
		*(u32 *)ip = bpf_htonl(6u << 28);
		*(u32 *)(ip + 4) = bpf_htonl(all << 16 | IPPROTO_TCP << 8 | 64);
		__builtin_memcpy(ip + 8, key->guest, 16);
		__builtin_memcpy(ip + 24, key->remote, 16);
		off += 40;
	}
	off = forget(notes, 0, off);
	all = forget(notes, 1, all);
	BOUND(off, 0x7f);
	u8 *tcp = b + off;
	*(u16 *)tcp = key->guest_port;
	*(u16 *)(tcp + 2) = key->remote_port;
	*(u32 *)(tcp + 4) = bpf_htonl(is->seq);
	*(u32 *)(tcp + 8) = bpf_htonl(is->ack);
	*(u32 *)(tcp + 12) = bpf_htonl(all / 4 << 28 | is->flags << 16 | is->win);
	*(u32 *)(tcp + 16) = 0;
	u64 sum = pseudo_sum(key, all);
	if (is->stamped) {
		*(u32 *)(tcp + 20) = bpf_htonl(STAMPS);
		*(u32 *)(tcp + 24) = bpf_htonl(is->ts_val);
		*(u32 *)(tcp + 28) = bpf_htonl(is->ts_ecr);
		sum += (u64)*(u32 *)(tcp + 20) + *(u32 *)(tcp + 24) + *(u32 *)(tcp + 28);
	}
	if (blocks) {
		u32 *o = (u32 *)(tcp + head), edge;
		o[0] = bpf_htonl(SACK_HEAD + 8 * blocks);
		sum += o[0];
#pragma unroll
		for (u32 i = 0; i < 2 * ACK_BLOCKS; i++) {
			edge = i < 2 * blocks ? bpf_htonl(notes->sack[i]) : 0;
			o[1 + i] = edge;
			sum += edge;
		}
	}
#pragma unroll
	for (int i = 0; i < 5; i++)
		sum += *(u32 *)(tcp + 4 * i);
	*(u16 *)(tcp + 16) = ~fold(sum);
	h->len = off + all;
	h->l4 = off;
	h->payload = off + all;
	h->type = HELD_ACK;
	h->flags = HELD_ACKS;
	h->sack = 0;
}

/* The SVM's blocks in `notes->sack`, of which the client may be told: above the ACK, and as far as the PVM has acknowledged (promise 2). They come to
 * the front; returns how many. */
static __always_inline u32 common_blocks(struct scratch *notes, u32 ack, u32 seen)
{
	u32 count = 0;
#pragma unroll
	for (u32 i = 0; i < 4; i++) {
		u32 left = notes->sack[2 * i], right = notes->sack[2 * i + 1], here = count & 3;
		if (left == right || !seq_lt(ack, left) || !seq_lt(left, seen) || count >= ACK_BLOCKS)
			continue;
		if (seq_lt(seen, right))
			right = seen;
		BOUND(here, 3);
		notes->sack[2 * here] = left;
		notes->sack[2 * here + 1] = right;
		count = here + 1;
	}
	return forget(notes, 2, count);
}
