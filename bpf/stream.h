/* TCP: two byte streams compared by position. All of it runs under the flow's lock, but for match_stream(), which the owner calls without. */

enum take {
	TAKE_PASS,    /* P2: the packet goes on as it is */
	TAKE_HOLD,    /* linked; somebody else will release it */
	TAKE_PARTIAL, /* P4: this program is now the owner and must send what is matched of the first packet (bpf/partial.c) */
	TAKE_DRAIN,   /* linked or used; this program is now the owner and must drain */
	TAKE_FULL,    /* the flow's list is full: the newest is refused */
	TAKE_STORE,   /* P4: needs a slot, come again with one */
	TAKE_SWALLOW, /* P4: tells nothing new */
	TAKE_RELEASE, /* P4: the PVM's first packet is proven and unlinked, this program must send it (struct release) */
	TAKE_CLOSED,  /* P2: the connection has ended, see over() */
	TAKE_PARKED = 16, /* P4: its record is linked; beside one of the others */
};


/* What was found wrong; told after the lock is open. */
struct finding {
	bool any;
	u32 reason; /* enum reason */
	u32 offset;
	u64 pvm, svm;
};

static __always_inline void diverge(struct flow *f, struct finding *found, u32 reason, u32 offset, u64 pvm, u64 svm)
{
	if (f->flags & FLOW_DIVERGED)
		return;
	f->flags |= FLOW_DIVERGED;
	found->any = true;
	found->reason = reason;
	found->offset = offset;
	found->pvm = pvm;
	found->svm = svm;
}

/* May the first record of the PVM's list leave? Never without the SVM's ACK being known; a pure ACK only up to it, unless proven data wait behind. */
static __always_inline bool releasable(const struct flow *f, const struct held *h)
{
	if (h->epoch != f->epoch && (s32)(f->epoch - h->epoch) > 0)
		return true; /* committed: the SVM's state includes it */
	if ((h->flags & HELD_ACKS) && !(f->flags & FLOW_S_ACK))
		return false;
	if (h->flags & HELD_PROVEN)
		return true;
	return h->type == HELD_ACK && (f->p_proven || seq_le(h->ack, f->s_ack));
}

static __always_inline void start_stream(struct flow *f, u32 at)
{
	f->flags = (f->flags & ~FLOW_FRESH) | FLOW_BASED;
	f->proven = f->matched = f->s_next = at;
}

/* A SYN that both sent begins a connection; its numbers tell when either sends it again. */
static __always_inline void note_syn(struct flow *f, const struct held *p, u32 svm_isn)
{
	f->svm_isn = svm_isn;
	f->pvm_isn = p->from;
	f->syn_digest = p->digest;
	f->flags = (f->flags & ~(FLOW_FIN | FLOW_RST | FLOW_REFUSED | FLOW_CLIENT | FLOW_CLIENT_FIN | FLOW_CLIENT_RST | FLOW_RUNS | FLOW_DUP | FLOW_NO_SACK)) |
		   FLOW_SVM_SYN | (p->flags & HELD_SACK_OK ? 0 : FLOW_NO_SACK);
	if (!(p->flags & HELD_ACKS)) { /* the guest connects: what was acknowledged on these ports was another connection's */
		f->flags &= ~(FLOW_S_ACK | FLOW_C_ACK);
		f->p_known = 0;
	}
}

/* What a PVM packet says of ACK and window, also while it is held: what both VMs have acknowledged need not wait for it. A SYN counts when it leaves,
 * until then the numbers are another connection's. */
static __always_inline void note_pvm_ack(struct flow *f, const struct held *h)
{
	if (f->p_known && seq_lt(h->ack, f->p_seen))
		return;
	f->p_known = 1;
	f->p_seen = h->ack;
	f->p_win = h->win;
}

/* Lowers ACK and window to what both VMs stand for (promise 2), and notes what the client has then been told. */
static __always_inline void account_release(struct flow *f, const struct held *h, u32 *ack, u16 *win)
{
	*ack = h->ack;
	*win = h->win;
	if (h->epoch != f->epoch) { /* committed, not proven: both VMs stand behind it now */
		if (h->type <= HELD_SYN && (!(f->flags & FLOW_BASED) || h->type == HELD_SYN || seq_lt(f->proven, h->end)))
			start_stream(f, h->end);
		if (h->type == HELD_SYN)
			note_syn(f, h, h->from);
		if ((h->flags & HELD_ACKS) && (!(f->flags & FLOW_S_ACK) || h->type == HELD_SYN || seq_lt(f->s_ack, h->ack))) {
			f->flags |= FLOW_S_ACK;
			f->s_ack = h->ack;
			f->s_win = h->win;
		}
	}
	if (!(h->flags & HELD_ACKS))
		return;
	if (h->type == HELD_SYN) {
		f->flags &= ~FLOW_C_ACK;
		f->p_known = 0;
	}
	note_pvm_ack(f, h);
	if (!(f->flags & FLOW_C_ACK) || seq_lt(f->p_ack, h->ack))
		f->p_ack = h->ack;
	if (seq_lt(f->s_ack, *ack))
		*ack = f->s_ack;
	if (f->s_win < *win)
		*win = f->s_win;
	if (!(f->flags & FLOW_C_ACK) || seq_lt(f->c_ack, *ack))
		f->c_ack = *ack;
	f->flags |= FLOW_C_ACK;
	f->c_win = *win;
}

/* The client was told less than both VMs would say now. A window is worth an own packet only if it was shut or has doubled. */
static __always_inline bool owes_ack(const struct flow *f)
{
	if ((f->flags & (FLOW_S_ACK | FLOW_C_ACK | FLOW_DIVERGED)) != (FLOW_S_ACK | FLOW_C_ACK) || (f->flags & FLOW_RST))
		return false;
	u32 both = seq_lt(f->s_ack, f->p_seen) ? f->s_ack : f->p_seen;
	u32 win = f->s_win < f->p_win ? f->s_win : f->p_win;
	return (f->flags & FLOW_DUP) || seq_lt(f->c_ack, both) || (win > f->c_win && win >= 2 * f->c_win);
}

static __always_inline void prove(struct flow *f, struct held *h)
{
	h->flags |= HELD_PROVEN;
	f->p_proven++;
}

/* Matching goes on behind record `h`. Whoever comes to the end without having found what fills the hole starts again with the first. */
static __always_inline void advance(struct flow *f, const struct held *h, bool stop)
{
	f->p_next = h->next;
	if ((stop || h->next == NONE) && (f->flags & FLOW_SEEK)) {
		f->flags &= ~(FLOW_SEEK | FLOW_REFILL);
		f->p_next = f->p_head;
	}
}

/* The stream is proven up to `end`; matching goes on behind record `h`, or, where a hole was just filled, from the first one. */
static __always_inline void prove_stream(struct flow *f, struct held *h, u32 end)
{
	prove(f, h);
	f->proven = f->matched = end;
	f->p_next = f->flags & FLOW_REFILL ? f->p_head : h->next;
	f->flags &= ~FLOW_SEEK;
}

/* Are PVM record `p` and SVM record `s` the same piece of stream, both at the frontier? */
static __always_inline bool same_piece(const struct flow *f, const struct held *p, const struct held *s)
{
	if (p->type != s->type || p->epoch != s->epoch || p->digest != s->digest)
		return false;
	if (p->type == HELD_SYN)
		return true; /* the ISNs differ */
	if (p->from != s->from || p->end != s->end)
		return false;
	return p->type == HELD_RST || ((f->flags & FLOW_BASED) && p->from == f->matched && f->matched == f->proven);
}

static __always_inline void end_piece(struct flow *f, const struct held *p, u32 svm_from)
{
	if (p->type == HELD_SYN) {
		start_stream(f, p->end);
		note_syn(f, p, svm_from);
	} else if (p->type == HELD_RST) {
		f->flags = (f->flags & ~FLOW_SVM_SYN) | FLOW_RST;
	} else {
		f->proven = f->matched = p->end;
		f->flags = (f->flags & ~FLOW_FRESH) | FLOW_OPEN;
		if (p->flags & HELD_FIN) /* a SYN from here on is another connection's, even with the same number */
			f->flags = (f->flags & ~FLOW_SVM_SYN) | FLOW_FIN;
	}
}

/* The PVM sends again what was proven. */
static __always_inline bool repeats(const struct flow *f, const struct held *h)
{
	if (h->type == HELD_DATA)
		return (f->flags & (FLOW_BASED | FLOW_FRESH)) == FLOW_BASED && seq_le(h->end, f->proven);
	return h->type == HELD_SYN && (f->flags & FLOW_SVM_SYN) && h->from == f->pvm_isn && h->digest == f->syn_digest;
}

/* Is there no room for PVM record `h`? Once a piece of the stream was refused, so is all behind it until it comes again: if taken, that would wait for
 * the piece, and at last leave it no room. `low`: the slab has few slots left, which are for what the SVM's output can prove at once. */
static __always_inline bool refuses(struct flow *f, const struct held *h, bool low)
{
	u32 high = f->p_count ? f->p_high : f->proven;

	if (h->type != HELD_DATA || !(f->flags & FLOW_BASED)) {
		if (h->type == HELD_SYN)
			f->flags &= ~FLOW_REFUSED;
		return f->p_count >= MAX_FIFO || (low && h->type != HELD_RST);
	}
	if ((f->flags & FLOW_REFUSED) && seq_lt(f->p_refused, h->from))
		return true;
	bool twin = f->p_count && !(f->flags & FLOW_GAP) && seq_le(h->end, high) && seq_lt(f->proven, h->end); /* these bytes are held */
	bool needed = seq_le(h->from, f->matched) && !twin;
	bool full = f->p_count >= MAX_FIFO + (needed ? FIFO_SPARE : 0) || (low && !needed);
	if (!full) {
		if (seq_lt(f->p_refused, h->end))
			f->flags &= ~FLOW_REFUSED;
	} else if (!(f->flags & FLOW_REFUSED) && seq_lt(high, h->end)) {
		f->flags |= FLOW_REFUSED;
		f->p_refused = high;
	}
	return full;
}

/* Have both sides closed, and each acknowledged the other's FIN? Then a VM that has forgotten the connection resets whatever comes late, and one that has
 * not, or that did not get the late packet, doesn't. Nobody needs such a reset: it is dropped, be it the PVM's or the SVM's. */
static __always_inline bool over(const struct flow *f)
{
	u32 ends = FLOW_FIN | FLOW_CLIENT | FLOW_CLIENT_FIN | FLOW_C_ACK;
	return (f->flags & ends) == ends && !seq_lt(f->client_ack, f->proven) && !seq_lt(f->c_ack, f->client_end);
}

/* Until something is proven, a flow that was met in the middle begins at the lowest piece that either VM has sent: nothing below was ever compared. */
static __always_inline void lower_base(struct flow *f, const struct held *h)
{
	u32 no = !(f->flags & FLOW_FRESH) | (h->type ^ HELD_DATA) | (f->matched ^ f->proven) | f->owner; /* one branch: the verifier counts them */
	if (no || !seq_lt(h->from, f->proven))
		return;
	f->proven = f->matched = f->s_next = h->from;
	if (f->p_count)
		f->flags |= FLOW_GAP | FLOW_REFILL;
}

/* PVM record `h` will be the last of the list: is a hole before it, or does it fill one? */
static __always_inline void note_order(struct flow *f, const struct held *h)
{
	if (!f->p_count) {
		f->flags &= ~(FLOW_GAP | FLOW_REFILL | FLOW_SEEK);
		f->p_high = f->proven;
	}
	if (h->type == HELD_DATA && seq_lt(f->p_high, h->from))
		f->flags |= FLOW_GAP;
	else if (h->type == HELD_DATA && (f->flags & FLOW_GAP) && seq_lt(h->from, f->p_high))
		f->flags |= FLOW_REFILL; /* it may fill the hole before what is held */
	if (h->type == HELD_SYN || (h->type == HELD_DATA && seq_lt(f->p_high, h->end)))
		f->p_high = h->end;
}

/* A PVM packet, its record filled in. `single`: it may pass, or its program become the owner; a segment of a super-packet may not.
 * `*used`: a slot of the SVM's that it used up. */
static __always_inline u32 p_take_stream(struct flow *f, struct held_table *t, u32 index, struct held *h, u64 now, bool single, u32 *used)
{
	bool alone = single && !h->sack && !f->p_count && !f->owner && may_pass(f, now);
	bool acked = !(h->flags & HELD_ACKS) || (f->flags & FLOW_S_ACK);

	if (!(f->flags & FLOW_BASED) && (h->type == HELD_DATA || h->type == HELD_ACK)) {
		const struct held *r = record(t, f->s_head);
		bool below = f->s_head != NONE && r->type == HELD_DATA && seq_lt(r->from, h->from);
		start_stream(f, below ? r->from : h->from); /* what the PVM sent before was before its protection */
		f->flags |= FLOW_FRESH;
	} else {
		lower_base(f, h);
	}
	if (h->type == HELD_ACK && !(f->flags & FLOW_FRESH))
		f->flags |= FLOW_OPEN; /* a guest that only receives never sends data; of a flow met in the middle it may be the answer to a late FIN */
	if (single && h->type == HELD_RST && over(f))
		return TAKE_CLOSED;
	if ((h->flags & HELD_ACKS) && h->type != HELD_SYN && h->type != HELD_RST)
		note_pvm_ack(f, h);
	if (h->type == HELD_ACK && alone && acked && seq_le(h->ack, f->s_ack))
		return TAKE_PASS;
	if (repeats(f, h)) {
		if (single && !h->sack && acked && may_pass(f, now))
			return TAKE_PASS;
		h->flags |= HELD_PROVEN;
	}
	if (alone && acked && f->s_head != NONE && !(f->flags & FLOW_DIVERGED)) {
		u32 s = f->s_head;
		struct held *r = record(t, s), *then = record(t, r->next);
		/* What the SVM sent twice must not stay behind: the owner clears it. */
		bool clear = r->next == NONE || then->type != r->type || (r->type == HELD_DATA && seq_le(r->end, then->from));
		if (clear && same_piece(f, h, r)) {
			end_piece(f, h, r->from);
			s_unlink_head(f, t);
			*used = s;
			return TAKE_PASS;
		}
	}
	note_order(f, h);
	if ((h->flags & HELD_PROVEN) && !f->owner) /* an owner may count on what is in front */
		p_urge(f, t, index);
	else
		p_append(f, t, index);
	if (f->owner) {
		f->work = 1;
		return TAKE_HOLD;
	}
	if (single && ((f->s_count && f->p_next != NONE && !(f->flags & FLOW_DIVERGED)) || (h->sack && f->p_head == index && releasable(f, h)))) {
		f->owner = 1;
		return TAKE_DRAIN;
	}
	return TAKE_HOLD;
}

/* What an SVM packet says of ACK and window, whatever else becomes of it. */
static __always_inline void note_svm_ack(struct flow *f, const struct held *s)
{
	if (!(s->flags & HELD_ACKS))
		return;
	if (!(f->flags & FLOW_S_ACK) || s->type == HELD_SYN || seq_lt(f->s_ack, s->ack)) {
		f->s_ack = s->ack;
		f->s_win = s->win;
		f->flags = (f->flags | FLOW_S_ACK) & ~FLOW_DUP;
	} else if (f->s_ack == s->ack) {
		f->s_win = s->win;
	}
}

/* Is there something to send that this packet may be the vessel for? */
static __always_inline u32 drain_or(struct flow *f, struct held_table *t, u32 otherwise, bool stream)
{
	bool ready = f->work || (stream && owes_ack(f)) || (f->p_head != NONE && releasable(f, record(t, f->p_head)));
	if (!ready)
		return otherwise;
	if (f->owner) {
		f->work = 1;
		return otherwise;
	}
	f->owner = 1;
	return TAKE_DRAIN;
}

/* Is the PVM's first record matched in part? The record that is begins where the matching is; another that overlaps it is whole, and so is its sum. Under
 * the lock. */
static __always_inline bool partly_matched(const struct flow *f, const struct held *h)
{
	return h->type == HELD_DATA && !(h->flags & HELD_PROVEN) && !h->sack && h->epoch == f->epoch && seq_lt(f->proven, f->matched) &&
	       seq_lt(h->start, f->matched) && h->from == f->matched && seq_lt(f->matched, h->end) && (!(h->flags & HELD_ACKS) || (f->flags & FLOW_S_ACK));
}

/* The PVM's first record `p` is just proven, by a flow without owner: it is unlinked and the caller's to send. */
static __always_inline u32 release_first(struct flow *f, struct held_table *t, const struct held *p, u64 now, struct release *out, bool stream)
{
	u32 ack = 0;
	u16 win = 0;

	account_release(f, p, &ack, &win);
	out->ack = ack;
	out->win = win;
	out->index = f->p_head;
	p_unlink_head(f, t);
	note_emit(f, out->cpu, now);
	struct held *next = record(t, f->p_head);
	out->more = f->work || (f->p_head != NONE && releasable(f, next));
	if (stream) /* behind it may be what the PVM sent twice, which only matching finds */
		out->more |= owes_ack(f) || f->p_next != f->p_head || (f->p_head != NONE && repeats(f, next));
	f->owner = out->more;
	return TAKE_RELEASE;
}

/* The SVM repeats its ACK: it lacks a segment of the client's that the PVM has. The client would wait for its retransmission timeout, as all that it
 * gets of the PVM's ACKs is lowered or held; so the SVM's duplicates go on to it (RFC 5681, 3.2). Without SACK blocks a duplicate is one only with the
 * same window. Before note_svm_ack(). `sack`: the packet's blocks. */
static __always_inline void note_svm_dup(struct flow *f, const struct held *s, const u32 *sack)
{
	u32 known = FLOW_S_ACK | FLOW_C_ACK; /* and with the latter `p_seen` */

	if (s->type != HELD_ACK || (f->flags & known) != known || s->ack != f->s_ack || !seq_lt(f->s_ack, f->p_seen))
		return;
	u32 same = s->win == f->s_win, any = 0, tells = 0;
#pragma unroll
	for (int b = 0; b < 8; b += 2) {
		u32 there = sack[b] != sack[b + 1];
		any |= there;
		tells |= there & seq_lt(f->s_ack, sack[b]) & seq_lt(sack[b], f->p_seen);
	}
	if (tells | (same & !any))
		f->flags |= FLOW_DUP;
}

/* An SVM packet, not stored yet. */
static __always_inline u32 s_take_stream(struct flow *f, struct held_table *t, const struct held *s, bool low, u64 now, struct release *out)
{
	note_svm_ack(f, s);
	lower_base(f, s);
	if (s->type == HELD_ACK || (f->flags & FLOW_DIVERGED) || (s->type == HELD_RST && over(f)))
		return drain_or(f, t, TAKE_SWALLOW, true);
	if (s->type == HELD_SYN && (f->flags & FLOW_SVM_SYN) && f->svm_isn == s->from)
		return drain_or(f, t, TAKE_SWALLOW, true); /* the SVM sends its SYN again */
	if (s->type == HELD_DATA && (f->flags & FLOW_BASED) && seq_le(s->end, f->matched)) { /* the SVM sends again what was compared */
		bool has = (f->flags & FLOW_CLIENT) && !seq_lt(f->client_ack, f->matched); /* it got that part already */
		if (!f->owner && !has && f->p_head != NONE && partly_matched(f, record(t, f->p_head))) {
			f->owner = 1;
			return TAKE_PARTIAL;
		}
		return drain_or(f, t, TAKE_SWALLOW, true);
	}
	if (!f->owner && !f->s_count && f->p_next != NONE) {
		struct held *p = record(t, f->p_next);
		if (!(p->flags & HELD_PROVEN) && same_piece(f, p, s)) {
			u32 end = p->end, next = f->p_next;
			end_piece(f, p, s->from);
			if (p->type == HELD_DATA) {
				prove_stream(f, p, end);
			} else {
				prove(f, p);
				f->p_next = p->next;
			}
			if (p->type == HELD_DATA && f->p_head == next && !p->sack && releasable(f, p) && may_emit(f, out->cpu, now))
				return release_first(f, t, p, now, out, true);
			f->owner = 1;
			return TAKE_DRAIN;
		}
	}
	bool needed = s->type == HELD_DATA && (f->flags & FLOW_BASED) && seq_le(s->from, f->matched); /* what all the parked ones wait for */
	return f->s_count >= MAX_FIFO + (needed ? FIFO_SPARE : 0) || (low && !needed) ? TAKE_FULL : TAKE_STORE;
}

enum step { STEP_MORE, STEP_WAIT };

/* One step of matching the PVM's record at `p_next` with the SVM's first. Called by the owner, without the lock.
 * `*used`: a slot of the SVM's that is used up. */
static __always_inline u32 match_stream(struct flow *f, struct held_table *t, struct scratch *notes, const struct hash_keys *keys, struct finding *found, u32 *used)
{
	u32 p_index = f->p_next, s_index = f->s_head;
	bool ok = true;
	u32 trim = 0; /* 1: the PVM's record, 2: the SVM's begins before the frontier */
	u64 piece = 0;

	if (f->flags & FLOW_DIVERGED)
		return STEP_WAIT;
	struct held *p = record(t, p_index), *s = record(t, s_index);
	if (s_index != NONE && (s->epoch != f->epoch || (s->type == HELD_SYN && f->svm_isn == s->from && (f->flags & FLOW_SVM_SYN)) ||
				(s->type == HELD_DATA && (f->flags & FLOW_BASED) && seq_le(s->end, f->matched)))) {
		*used = s_index; /* of an older state, or sent twice */
		return STEP_MORE;
	}
	if (p_index == NONE)
		return STEP_WAIT;
	bool again = repeats(f, p); /* held more than once */
	if (again || p->type == HELD_ACK || (p->flags & HELD_PROVEN) || (s32)(f->epoch - p->epoch) > 0) {
		bpf_spin_lock(&f->lock);
		if (again && !(p->flags & HELD_PROVEN))
			prove(f, p);
		advance(f, p, false);
		bpf_spin_unlock(&f->lock);
		return STEP_MORE;
	}
	if (s_index == NONE || p->epoch != f->epoch)
		return STEP_WAIT; /* the latter belongs to a commit that is still to come */
	if ((f->flags & FLOW_SEEK) && p->type != HELD_DATA) {
		bpf_spin_lock(&f->lock);
		advance(f, p, true);
		bpf_spin_unlock(&f->lock);
		return STEP_MORE;
	}
	if (p->type == HELD_SYN && s->type == HELD_DATA) {
		*used = s_index; /* of an older connection */
		return STEP_MORE;
	}
	if (p->type != HELD_DATA || s->type != HELD_DATA) {
		bool same = same_piece(f, p, s);
		u32 reason = p->type == HELD_RST || s->type == HELD_RST ? REASON_RST : p->type == HELD_SYN ? REASON_OPTIONS : REASON_FLAGS;
		bpf_spin_lock(&f->lock);
		if (same) {
			end_piece(f, p, s->from);
			prove(f, p);
			f->p_next = p->next;
		} else {
			diverge(f, found, reason, p->from, p->digest, s->digest);
		}
		bpf_spin_unlock(&f->lock);
		if (!same)
			return STEP_WAIT;
		*used = s_index;
		return STEP_MORE;
	}

	u32 at_pos = f->matched, p_from = p->from, p_end = p->end, s_from = s->from, s_end = s->end, from, to, index;
	if (seq_lt(at_pos, s_from) || (seq_lt(at_pos, p_from) && !(f->flags & FLOW_REFILL)))
		return STEP_WAIT; /* a hole on one side */
	if (seq_lt(at_pos, p_from)) {
		bpf_spin_lock(&f->lock);
		f->flags |= FLOW_SEEK;
		advance(f, p, false);
		bpf_spin_unlock(&f->lock);
		return STEP_MORE;
	}
	if (p_from != at_pos) {
		trim = 1;
		from = p_from;
		to = at_pos;
		index = p_index;
	} else if (s_from != at_pos) {
		trim = 2;
		from = s_from;
		to = at_pos;
		index = s_index;
	} else if (seq_lt(p_end, s_end)) {
		from = at_pos;
		to = p_end;
		index = s_index;
	} else { /* all of the SVM's record is in the PVM's: no byte has to be read again */
		bpf_spin_lock(&f->lock);
		p->digest -= s->digest;
		p->from = s_end;
		f->matched = s_end;
		if (s_end == p_end) {
			if (p->digest == 0) {
				end_piece(f, p, 0);
				prove_stream(f, p, p_end);
			} else {
				diverge(f, found, (p->flags ^ s->flags) & HELD_FIN ? REASON_FIN : REASON_PAYLOAD, p_from, p->digest + s->digest, s->digest);
			}
		}
		bpf_spin_unlock(&f->lock);
		*used = s_index;
		return STEP_MORE;
	}

	trim = forget(notes, 0, trim);
	from = forget(notes, 1, from);
	to = forget(notes, 2, to);
	index = forget(notes, 3, index);
	struct held *cut = record(t, index);
	struct slot *bytes = slab.lookup(&index);
	if (!bytes)
		return STEP_WAIT;
	struct view v = {.data = bytes->byte, .len = cut->len, .slot = true};
	piece = range_hash(keys, &v, cut->payload + (from - cut->start), to - from, from, true, &ok);
	bpf_spin_lock(&f->lock);
	if (!ok) {
		diverge(f, found, REASON_STRUCTURE, from, 0, 0);
	} else if (trim == 1) {
		p->digest -= piece;
		p->from = at_pos;
	} else {
		s->digest -= piece;
		s->from = to;
		if (!trim) {
			f->matched = p->from = p_end;
			if (p->digest == piece) {
				end_piece(f, p, 0);
				prove_stream(f, p, p_end);
			} else {
				diverge(f, found, p->flags & HELD_FIN ? REASON_FIN : REASON_PAYLOAD, at_pos, p->digest, piece);
			}
		}
	}
	bpf_spin_unlock(&f->lock);
	return STEP_MORE;
}
