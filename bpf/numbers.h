/* TCP numbers of a segment: which of its fields change for a guest whose numbers are others than the client (or the primary) knows, and how.
 * The number that is known = the guest's + delta. To the guest: ack, SACK blocks (RFC 2018) and timestamp echo (RFC 7323); from it: seq and timestamp. */

/* What is added to a guest's numbers for who knows others, and taken off again on the way back. */
struct deltas {
	u32 seq, ts;
};

static __always_inline void edit(struct edits *e, u32 off, u32 old, u32 new)
{
	u32 i = e->count;
	if (i >= MAX_EDITS - 1 || old == new)
		return;
	BOUND(i, MAX_EDITS - 1);
	e->at[i].off = off;
	e->at[i].old = old;
	e->at[i].new = new;
	e->count = i + 1;
}

/* Walks the TCP options. `echo`: the timestamp that changes is the echo, not the value. SACK blocks change only with `sack`. */
static __always_inline void edit_options(struct edits *e, const struct view *v, const struct packet *p, u32 seq_delta, u32 ts_delta, bool echo, bool sack)
{
	u32 off = p->l4 + 20, end = off + p->options;

#pragma nounroll
	for (int i = 0; i < 40; i++) {
		u8 *o = peek(v, off, 2);
		if (off >= end || !o || o[0] == 0)
			break;
		if (o[0] == 1) {
			off++;
			BOUND(off, MAX_FRAME);
			continue;
		}
		u32 len = o[1];
		if (len < 2 || off + len > end)
			break;
		if (o[0] == 8 && len == 10 && ts_delta) {
			u32 *t = peek(v, off + (echo ? 6 : 2), 4);
			if (t && *t)
				edit(e, off + (echo ? 6 : 2), *t, bpf_htonl(bpf_ntohl(*t) + ts_delta));
		}
		if (o[0] == 5 && sack && seq_delta) {
#pragma unroll
			for (int b = 0; b < 8; b++) {
				u32 *edge = peek(v, off + 2 + 4 * b, 4);
				if (2 + 4 * b + 4 <= len && edge)
					edit(e, off + 2 + 4 * b, *edge, bpf_htonl(bpf_ntohl(*edge) + seq_delta));
			}
		}
		off += len;
		BOUND(off, MAX_FRAME);
	}
}

/* Notes the timestamps option's fields, host order. False: there is none. */
static __always_inline bool timestamps(const struct view *v, const struct packet *p, u32 *val, u32 *ecr)
{
	u32 off = p->l4 + 20, end = off + p->options;

#pragma nounroll
	for (int i = 0; i < 40; i++) {
		u8 *o = peek(v, off, 10);
		if (off >= end)
			break;
		if (!o) {
			o = peek(v, off, 2);
			if (!o || o[0] == 0)
				break;
			off += o[0] == 1 || o[1] < 2 ? 1 : o[1];
			BOUND(off, MAX_FRAME);
			continue;
		}
		if (o[0] == 0)
			break;
		if (o[0] == 8 && o[1] == 10) {
			*val = be32_at(o + 2);
			*ecr = be32_at(o + 6);
			return true;
		}
		off += o[0] == 1 || o[1] < 2 ? 1 : o[1];
		BOUND(off, MAX_FRAME);
	}
	return false;
}

/* A segment for a guest whose numbers are others than the sender knows. */
static __always_inline void edit_input(struct edits *e, const struct view *v, const struct packet *p, u32 seq_delta, u32 ts_delta)
{
	if (p->tcp_flags & TCP_ACK)
		edit(e, p->l4 + 8, bpf_htonl(p->ack), bpf_htonl(p->ack - seq_delta));
	if (p->options && (seq_delta || ts_delta))
		edit_options(e, v, p, -seq_delta, -ts_delta, true, true);
}

/* And one that it sends. */
static __always_inline void edit_output(struct edits *e, const struct view *v, const struct packet *p, u32 seq_delta, u32 ts_delta)
{
	if (!(p->tcp_flags & TCP_RST) || p->seq) /* a reset of what never was has number 0 on both sides */
		edit(e, p->l4 + 4, bpf_htonl(p->seq), bpf_htonl(p->seq + seq_delta));
	if (p->options && ts_delta)
		edit_options(e, v, p, 0, ts_delta, false, false);
}

/* Writes the edits into a packet of tc's, whose checksum may still be partial: the helpers know. */
static __always_inline bool apply(struct __sk_buff *skb, const struct edits *e, const struct packet *p, struct place *at)
{
	if (!e->count)
		return true;
	at->count->translated++;
#pragma unroll
	for (int i = 0; i < 10; i++) {
		if (i >= e->count)
			continue;
		u32 off = e->at[i].off, old = e->at[i].old, new = e->at[i].new;
		if (bpf_skb_store_bytes(skb, off, &new, 4, 0))
			return false;
		if ((off - p->l4) & 1) { /* at an odd offset the sum's bytes are swapped (RFC 1071) */
			old = old << 8 | old >> 24;
			new = new << 8 | new >> 24;
		}
		if (bpf_l4_csum_replace(skb, p->l4_check, old, new, 4))
			return false;
	}
	return true;
}

#define NEAR_NUMBERS (1u << 26) /* bytes: more than segments of one VM's stream lie apart, however large its window */

static __always_inline u32 apart(u32 a, u32 b) { return seq_lt(a, b) ? b - a : a - b; }

/* Does the SVM's segment continue the SVM's own numbers, which were at `last`, or the PVM's? `sure`: only a clear answer counts, the connection's numbers
 * are not in doubt. */
static __always_inline bool own_numbers(u32 last, u32 delta, u32 seq, bool sure)
{
	u32 own = apart(seq, last), copied = apart(seq, last + delta);
	return sure ? own <= NEAR_NUMBERS || copied > NEAR_NUMBERS : own <= copied;
}
