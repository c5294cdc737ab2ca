/* TCP numbers of a connection that the SVM opened with another ISN than the PVM: what S1, S2 and S3 learn of them. PVM's number = SVM's + delta. */

/* A checkpoint is under way, or has failed: is the SVM the one that opened this connection, or already a copy of the PVM? Nobody may be left who could
 * tell (the primary can die in between), but the SVM's next segment does: own_numbers(). Under the lock. */
static __always_inline bool in_doubt(const struct flow *f, const struct place *at, u32 kept)
{
	return f->epoch != at->epoch && (f->flags & FLOW_DELTA) && (s32)(f->epoch - kept) >= 0;
}

#define RESET_AHEAD (1u << 23) /* bytes that a client's reset may be ahead of what the guest has acknowledged: more than its window is */

/* What the SVM has sent last, in its own numbers, as far as it was seen. */
static __always_inline u32 last_own(const struct flow *f) { return f->flags & FLOW_SENT ? f->svm_high : f->svm_isn; }

static __always_inline u32 kept_epoch(const struct place *at)
{
	struct pair *pair = pairs.lookup(&at->nic->pair);
	return pair ? *(volatile u32 *)&pair->kept_epoch : at->epoch;
}

/* For how long the flow of an ended connection is needed beyond the usual: what the client has not acknowledged may have died with the primary, and the
 * SVM says it again when it is the guest, in its own numbers. Meanwhile its timeouts grow. Under the lock. */
static __always_inline u32 linger(const struct flow *f)
{
	u32 closing = f->flags & (FLOW_DELTA | FLOW_FIN | FLOW_RST);
	return closing == (FLOW_DELTA | FLOW_FIN) && seq_lt(f->client_ack - f->seq_delta, f->svm_end) ? LINGER_S : 0;
}

/* From the client: what S1 and S3 learn from the segment, and by how much its numbers change. Returns false for a segment that must not reach the SVM. */
static __always_inline bool learn_input(const struct view *v, const struct packet *p, const struct place *at, u64 now, struct deltas *d)
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
			if (flags & TCP_SYN)
				f->client_isn = p->seq;
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
	if (flags & TCP_ACK)
		f->client_ack = p->ack;
	if ((flags & TCP_RST) && (!(f->flags & FLOW_DELTA) || p->seq - f->s_ack < RESET_AHEAD)) /* the guest ignores any other (RFC 5961) */
		f->flags |= FLOW_RST;
	if (flags & TCP_FIN)
		f->flags |= FLOW_CLIENT_FIN;
	f->linger_s = linger(f);
	bpf_spin_unlock(&f->lock);
	d->seq = seq_delta;
	d->ts = ts_delta;
	return good;
}

/* From the SVM: what S2 learns from the segment, and by how much its numbers change. */
static __always_inline void learn_output(const struct view *v, const struct packet *p, const struct place *at, u64 now, struct deltas *d)
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
		same = (flags & (TCP_SYN | TCP_RST)) || own_numbers(last_own(f), f->seq_delta, p->seq, same);
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
	if (flags & TCP_ACK)
		f->s_ack = p->ack;
	if (flags & TCP_RST)
		f->flags |= FLOW_RST;
	if (flags & TCP_FIN) {
		f->flags |= FLOW_FIN;
		f->svm_end = p->seq + p->length + 1;
	}
	f->linger_s = linger(f);
	bpf_spin_unlock(&f->lock);
	d->seq = seq_delta;
	d->ts = ts_delta;
}

/* S1, and S3 of the promoted: what becomes of a segment of the client's. Returns false if it must not reach the SVM. */
static __always_inline bool from_client(struct edits *e, const struct view *v, const struct packet *p, const struct place *at, u64 now, bool promoted)
{
	struct deltas d = {};
	bool aliased = promoted && alias_input(p, at, now, &d); /* in lock-step S1 hears of the guest's own numbers */

	if (!aliased) {
		d.seq = d.ts = 0;
		if (!learn_input(v, p, at, now, &d))
			return false;
	}
	edit_input(e, v, p, d.seq, d.ts);
	return true;
}

/* S2: what becomes of one of the SVM's. */
static __always_inline void from_svm(struct edits *e, const struct view *v, const struct packet *p, const struct place *at, u64 now)
{
	struct deltas d = {};
	bool aliased = at->state != SYNCING && alias_output(p, at, now, &d); /* whatever speaks while a protection begins, it is no replica yet */

	if (!aliased) {
		d.seq = d.ts = 0;
		learn_output(v, p, at, now, &d);
	}
	edit_output(e, v, p, d.seq, d.ts);
}
