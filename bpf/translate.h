/* TCP numbers of a connection that the SVM opened with another ISN than the PVM: which fields of a segment change, and from what to what.
 * PVM's number = SVM's + delta. Client to SVM: ack, SACK blocks (RFC 2018) and timestamp echo (RFC 7323); SVM to client: seq and timestamp. */

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

#define NEAR_NUMBERS (1u << 26) /* bytes: more than segments of one VM's stream lie apart, however large its window */

static __always_inline u32 apart(u32 a, u32 b) { return seq_lt(a, b) ? b - a : a - b; }

/* A checkpoint is under way, or has failed: is the SVM the one that opened this connection, or already a copy of the PVM? Nobody may be left who could
 * tell (the primary can die in between), but the SVM's next segment does: own_numbers(). Under the lock. */
static __always_inline bool in_doubt(const struct flow *f, const struct place *at, u32 kept)
{
	return f->epoch != at->epoch && (f->flags & FLOW_DELTA) && (s32)(f->epoch - kept) >= 0;
}

/* Does the SVM's segment continue the SVM's own numbers, not the PVM's? `sure`: only a clear answer counts, the connection's numbers are not in doubt. */
static __always_inline bool own_numbers(const struct flow *f, u32 seq, bool sure)
{
	u32 last = f->flags & FLOW_SENT ? f->svm_high : f->svm_isn;
	u32 own = apart(seq, last), copied = apart(seq, last + f->seq_delta);
	return sure ? own <= NEAR_NUMBERS || copied > NEAR_NUMBERS : own <= copied;
}

static __always_inline u32 kept_epoch(const struct place *at)
{
	struct pair *pair = pairs.lookup(&at->nic->pair);
	return pair ? *(volatile u32 *)&pair->kept_epoch : at->epoch;
}

/* From the client: what S1 and S3 learn from the segment, and change in it. Returns false for a segment that must not reach the SVM. */
static __always_inline bool from_client(struct edits *e, const struct view *v, const struct packet *p, const struct place *at, u64 now)
{
	struct flow_ref ref;
	u32 val = 0, ecr = 0, seq_delta = 0, ts_delta = 0;
	u8 flags = p->tcp_flags;
	bool good = true, syn = (flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;

	if (!find_flow((struct flow_key *)&p->key, &ref)) {
		if (!syn || !make_flow(at, (struct flow_key *)&p->key, &ref, now))
			return true; /* opened before the last checkpoint, or no room (told): the numbers stay */
	}
	struct flow *f = flows.lookup(&ref.index);
	if (!f)
		return true;
	bool stamped = timestamps(v, p, &val, &ecr);
	u32 kept = kept_epoch(at);
	bpf_spin_lock(&f->lock);
	if (!same_flow(f, ref.generation) || (in_doubt(f, at, kept) && !(syn && f->client_isn != p->seq))) {
		/* In doubt the numbers stay: right for a copy, and an SVM of other numbers answers what it can't use with an ACK of its own (RFC 5961). */
		bpf_spin_unlock(&f->lock);
		return true;
	}
	f->last_ns = now;
	if (f->epoch != at->epoch || (syn && f->client_isn != p->seq)) { /* a checkpoint made the VMs equal, or the ports are used again */
		f->epoch = at->epoch;
		f->flags = FLOW_LIVE;
		f->client_isn = p->seq;
		if (!syn)
			f->flags |= FLOW_OPEN; /* equal on both sides: offset zero */
	}
	if (!(flags & TCP_SYN) || (flags & TCP_ACK)) {
		if ((flags & TCP_ACK) && !(f->flags & (FLOW_OPEN | FLOW_DELTA))) {
			/* The first ACK of a handshake tells the PVM's ISN; its echo tells the PVM's timestamp. */
			f->pvm_isn = p->ack - 1;
			f->flags |= FLOW_PVM_ISN;
			if (stamped && ecr) {
				f->pvm_ts = ecr;
				f->flags |= FLOW_PVM_TS;
			}
			if (f->flags & FLOW_SVM_ISN)
				f->flags |= FLOW_DELTA;
			else
				good = false; /* the SVM has not answered yet and would reset; what comes next tells it as much */
			f->seq_delta = f->pvm_isn - f->svm_isn;
			f->ts_delta = (f->flags & FLOW_SVM_TS) && (f->flags & FLOW_PVM_TS) ? f->pvm_ts - f->svm_ts : 0;
		}
		if (f->flags & FLOW_DELTA) {
			seq_delta = f->seq_delta;
			ts_delta = f->ts_delta;
		}
	}
	if (stamped && ecr && (f->flags & FLOW_AGAIN)) {
		/* The client echoes when the PVM has sent, which tells nothing of the SVM's copies. Older than what the SVM has sent again, it would
		 * mean that the SVM need not have (RFC 3522): its stack would take back what it knows of losses, and wait for its timeout. */
		if (seq_lt(ecr - ts_delta, f->svm_again))
			ts_delta = ecr - f->svm_again;
		else
			f->flags &= ~FLOW_AGAIN;
	}
	if (flags & TCP_RST)
		f->flags |= FLOW_RST;
	if (flags & TCP_FIN)
		f->flags |= FLOW_CLIENT_FIN;
	bpf_spin_unlock(&f->lock);
	if (flags & TCP_ACK)
		edit(e, p->l4 + 8, bpf_htonl(p->ack), bpf_htonl(p->ack - seq_delta));
	if (p->options && (seq_delta || ts_delta))
		edit_options(e, v, p, -seq_delta, -ts_delta, true, true);
	return good;
}

/* From the SVM: what S2 learns from the segment, and changes in it. */
static __always_inline void from_svm(struct edits *e, const struct view *v, const struct packet *p, const struct place *at, u64 now)
{
	struct flow_ref ref;
	u32 val = 0, ecr = 0, seq_delta = 0, ts_delta = 0;
	u8 flags = p->tcp_flags;
	bool opens = (flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;

	if (!find_flow((struct flow_key *)&p->key, &ref)) {
		if (!opens || !make_flow(at, (struct flow_key *)&p->key, &ref, now))
			return;
	}
	struct flow *f = flows.lookup(&ref.index);
	if (!f)
		return;
	bool stamped = timestamps(v, p, &val, &ecr);
	u32 kept = kept_epoch(at);
	bpf_spin_lock(&f->lock);
	if (!same_flow(f, ref.generation)) {
		bpf_spin_unlock(&f->lock);
		return;
	}
	f->last_ns = now;
	bool doubt = in_doubt(f, at, kept), same = f->epoch == at->epoch;
	if (doubt || (same && (f->flags & FLOW_DELTA))) /* also in this epoch: the old SVM may have opened it while the checkpoint was under way */
		same = (flags & (TCP_SYN | TCP_RST)) || own_numbers(f, p->seq, same);
	f->epoch = at->epoch;
	if (!same)
		f->flags = FLOW_LIVE | (opens ? 0 : FLOW_OPEN);
	if (opens && (f->flags & FLOW_SVM_ISN) && f->svm_isn != p->seq)
		f->flags = FLOW_LIVE; /* the ports are used again */
	if ((flags & TCP_SYN) && !(f->flags & (FLOW_DELTA | FLOW_OPEN))) {
		f->svm_isn = p->seq;
		f->flags |= FLOW_SVM_ISN;
		if (stamped) {
			f->svm_ts = val;
			f->flags |= FLOW_SVM_TS;
		}
		if (f->flags & FLOW_PVM_ISN) { /* the client's ACK was early */
			f->flags |= FLOW_DELTA;
			f->seq_delta = f->pvm_isn - f->svm_isn;
			f->ts_delta = (f->flags & FLOW_SVM_TS) && (f->flags & FLOW_PVM_TS) ? f->pvm_ts - f->svm_ts : 0;
		}
	}
	if ((f->flags & FLOW_DELTA) && !(flags & TCP_SYN)) { /* a SYN is compared without its number, and its ISN tells a retransmission */
		seq_delta = f->seq_delta;
		ts_delta = f->ts_delta;
	}
	if (p->length && !(flags & TCP_SYN)) {
		u32 end = p->seq + p->length;
		if ((f->flags & FLOW_SENT) && seq_lt(p->seq, f->svm_high) && stamped) {
			f->svm_again = val;
			f->flags |= FLOW_AGAIN;
		}
		if (!(f->flags & FLOW_SENT) || seq_lt(f->svm_high, end))
			f->svm_high = end;
		f->flags |= FLOW_SENT;
	}
	if (flags & TCP_RST)
		f->flags |= FLOW_RST;
	if (flags & TCP_FIN)
		f->flags |= FLOW_FIN;
	bpf_spin_unlock(&f->lock);
	if (!(flags & TCP_RST) || p->seq) /* a reset of what never was has number 0 on both sides */
		edit(e, p->l4 + 4, bpf_htonl(p->seq), bpf_htonl(p->seq + seq_delta));
	if (p->options && ts_delta)
		edit_options(e, v, p, 0, ts_delta, false, false);
}
