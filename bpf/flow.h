/* Flows and the slots linked to them: taking, giving back, the two lists of a flow. Who may touch what:
 *
 * - A flow's fields and the records of its slots are changed under the flow's lock. There is no other lock and no nesting, so no deadlock.
 * - Matching and releasing belong to one program at a time, the flow's owner (`flow->owner`, taken and given up under the lock). Whoever finds an
 *   owner appends its record, sets `flow->work` and leaves. The owner gives up only under the lock and only when `work` is clear, so what was
 *   appended before is seen by the owner, and what is appended after finds no owner: no wake-up is lost, nothing is released twice.
 * - The owner may read records without the lock: others only append, and a record's bytes in the slab never change once it is linked.
 * - A flow's place in `flows` is never freed, only given another generation under its lock. A program that found the place before that sees the other
 *   generation under the lock and leaves it alone. (Elements of a kernel hash map could be reused under its feet.) */

/* A free slot of the slab, or NONE. Each CPU has a magazine of them for its hooks, and one for what user space runs; nothing on a hook interrupts
 * anything else there. When it is empty it is exchanged for a full one, so CPUs meet at the stacks once in MAGAZINE packets. A magazine belongs to who
 * took its number off a stack; the stacks' locks order what was written before. */
static __always_inline u32 take_slot_of(const struct place *at, u32 whose)
{
	struct scratch *notes = scratch.lookup(&whose);
	if (!notes)
		return NONE;
	u32 mine = notes->magazine;
	struct magazine *m = magazines.lookup(&mine);
	if (!m)
		return NONE;
	u32 left = m->count;
	if (!left) {
		u32 fresh;
		if (full_magazines.pop(&fresh)) {
			drop(at, DROP_NO_SLOT);
			return NONE;
		}
		if (mine)
			empty_magazines.push(&mine, 0);
		notes->magazine = fresh;
		m = magazines.lookup(&fresh);
		if (!m)
			return NONE;
		left = m->count;
		gauge_add(GAUGE_SLOTS_USED, left);
	}
	m->count = left - 1;
	BOUND(left, MAGAZINE);
	return m->at[left];
}

static __always_inline void give_slot_of(u32 whose, u32 index)
{
	struct scratch *notes = scratch.lookup(&whose);
	if (index >= MAX_SLOTS || !notes)
		return;
	u32 mine = notes->magazine;
	struct magazine *m = magazines.lookup(&mine);
	if (!m)
		return;
	u32 have = m->count;
	if (!mine || have >= MAGAZINE) {
		u32 empty;
		if (empty_magazines.pop(&empty)) /* never: SPARE_MAGAZINES */
			return;
		if (mine) {
			full_magazines.push(&mine, 0);
			gauge_add(GAUGE_SLOTS_USED, -(s64)have);
		}
		notes->magazine = empty;
		m = magazines.lookup(&empty);
		if (!m)
			return;
		have = 0;
	}
	m->count = ++have;
	BOUND(have, MAGAZINE);
	m->at[have] = index;
}

static __always_inline u32 take_slot(const struct place *at) { return take_slot_of(at, SCRATCH_HOOK); }
static __always_inline void give_slot(u32 index) { give_slot_of(SCRATCH_HOOK, index); }

/* The slab is filling up: say so once until it has fallen again. */
static __always_inline void watch_slab(const struct place *at)
{
	u32 which = GAUGE_LOW_TOLD;
	u64 used = gauge(GAUGE_SLOTS_USED), *told = gauges.lookup(&which);
	if (!told)
		return;
	if (used <= MAX_SLOTS - SLOTS_LOW) {
		if (*told && used < MAX_SLOTS / 2)
			*told = 0;
		return;
	}
	if (!*told) {
		*told = 1;
		at->count->high_waters++;
		tell(at, EVENT_HIGH_WATER, DROP_NO_SLOT, NONE, NULL, used, 0, 0);
	}
}

/* Only the spare slots are left. */
static __always_inline bool slab_low(void) { return gauge(GAUGE_SLOTS_USED) > MAX_SLOTS - SLOTS_SPARE; }

static __always_inline struct held *record(struct held_table *t, u32 index) { return &t->at[index & (MAX_SLOTS - 1)]; }

/* PVM list, in the PVM's order. Under the lock. */
static __always_inline void p_append(struct flow *f, struct held_table *t, u32 index)
{
	struct held *h = record(t, index);
	h->next = NONE;
	if (f->p_tail == NONE)
		f->p_head = index;
	else
		record(t, f->p_tail)->next = index;
	f->p_tail = index;
	f->p_count++;
	if (h->flags & HELD_PROVEN)
		f->p_proven++;
	else if (f->p_next == NONE && h->type <= HELD_RST)
		f->p_next = index;
}

/* PVM list, in front of what is still to be proven: a proven piece that the PVM sends again. The client waits for it before it acknowledges anything,
 * and so does the SVM before it goes on. */
static __always_inline void p_urge(struct flow *f, struct held_table *t, u32 index)
{
	struct held *h = record(t, index), *before = record(t, f->p_urgent);
	if (f->p_urgent == NONE) {
		h->next = f->p_head;
		f->p_head = index;
	} else {
		h->next = before->next;
		before->next = index;
	}
	if (h->next == NONE)
		f->p_tail = index;
	f->p_urgent = index;
	f->p_count++;
	f->p_proven++;
}

static __always_inline void p_unlink_head(struct flow *f, struct held_table *t)
{
	struct held *h = record(t, f->p_head);
	if (f->p_next == f->p_head)
		f->p_next = h->next;
	if (f->p_urgent == f->p_head)
		f->p_urgent = NONE;
	if (f->frag_first == f->p_head)
		f->frag_first = NONE;
	if (h->flags & HELD_PROVEN)
		f->p_proven--;
	f->p_head = h->next;
	if (f->p_head == NONE)
		f->p_tail = NONE;
	f->p_count--;
}

/* Where the search for the place of the SVM's record `h` may begin: behind the last record of the nearest piece before it, if that is still parked (it
 * is as long as its end was not matched). The list may be long, and the SVM fills the holes far behind its head too. NONE: at the head. */
static __always_inline u32 s_nearest(const struct flow *f, const struct held *h)
{
	u32 best = f->matched, tail = NONE;

	if (h->epoch != f->epoch)
		return NONE;
	if (seq_lt(best, f->s_next) && seq_le(f->s_next, h->from)) {
		best = f->s_next;
		tail = f->s_next_tail;
	}
	if (!(f->flags & FLOW_RUNS))
		return tail;
#pragma unroll
	for (int i = 0; i < RUNS; i++) {
		u32 end = f->s_run[i].end;
		u32 nearer = (end != f->s_run[i].from) & seq_lt(best, end) & seq_le(end, h->from);
		if (nearer) {
			best = end;
			tail = f->s_run[i].tail;
		}
	}
	return tail;
}

/* SVM list. Streams keep it by position, so that a retransmission fills its gap; the rest appends. False: it tells nothing new. Under the lock. */
static __always_inline bool s_insert(struct flow *f, struct held_table *t, u32 index, bool stream)
{
	struct held *h = record(t, index);
	u32 before = f->s_tail;

	if (stream && before != NONE && h->type == HELD_DATA) {
		struct held *tail = record(t, before);
		if (tail->type == HELD_DATA && seq_lt(h->from, tail->end)) {
			bool placed = false;
			before = s_nearest(f, h);
			u32 here = before == NONE ? f->s_head : record(t, before)->next;
#pragma nounroll
			for (int i = 0; i < WALK; i++) {
				struct held *r = record(t, here);
				if (here == NONE || seq_lt(h->from, r->from)) {
					placed = true;
					break;
				}
				if (seq_le(h->end, r->end) && h->epoch == r->epoch)
					return false;
				before = here;
				here = r->next;
			}
			if (!placed)
				return false; /* too deep in a long list; the SVM sends it again */
		}
	}
	if (before == NONE) {
		h->next = f->s_head;
		f->s_head = index;
	} else {
		struct held *r = record(t, before);
		h->next = r->next;
		r->next = index;
	}
	if (h->next == NONE)
		f->s_tail = index;
	f->s_count++;
	return true;
}

static __always_inline void s_unlink_head(struct flow *f, struct held_table *t)
{
	struct held *h = record(t, f->s_head);
	if (seq_lt(f->matched, h->end)) { /* unused: of an older connection or state, like all that was noted of it */
		f->s_next = f->matched;
		f->flags &= ~FLOW_RUNS;
		f->s_era++;
	}
	f->s_head = h->next;
	if (f->s_head == NONE)
		f->s_tail = NONE;
	f->s_count--;
}

static __always_inline bool same_flow(const struct flow *f, u32 generation) { return (f->flags & FLOW_LIVE) && f->generation == generation; }

/* When a packet may go its own way without overtaking one of its flow that is still between its release and the vif. Under the lock. (Signed: `now`
 * may be the coarse clock's, which lags behind the fine one by up to a tick.) */
static __always_inline bool may_pass(const struct flow *f, u64 now) { return !f->in_flight || (s64)(now - f->emit_ns) > (s64)EMIT_STALE_NS; }

static __always_inline u64 idle_limit(const struct flow *f)
{
	if (f->key.kind != KIND_TCP)
		return IDLE_OTHER;
	u32 fins = f->flags & (FLOW_FIN | FLOW_CLIENT_FIN);
	/* A translation is needed until both sides have closed: without it the SVM's numbers are wrong. */
	if ((f->flags & (FLOW_RST | FLOW_CLIENT_RST)) || (f->flags & FLOW_DELTA ? fins == (FLOW_FIN | FLOW_CLIENT_FIN) : fins))
		return IDLE_CLOSED + f->linger_s * SEC;
	return f->flags & (FLOW_OPEN | FLOW_DELTA) ? IDLE_TCP : IDLE_HALF_OPEN;
}

/* forget() of bpf/frame.h for 16 bits of what runs under the lock: kernel 6.1's verifier tells apart what later ones don't. */
static __always_inline u32 forget_here(struct flow *f, u16 x)
{
	volatile u16 *c = &f->cell;
	*c = x;
	return *c;
}

/* Ends flow `index` if nothing is held or in flight and it has been idle for its time. Its place goes back to the free ones. */
static __always_inline bool reclaim(u32 index, u64 now)
{
	struct flow *f = flows.lookup(&index);
	bool gone = false;

	if (!f || !(f->flags & FLOW_LIVE))
		return false;
	bpf_spin_lock(&f->lock);
	if ((f->flags & FLOW_LIVE) && !f->owner && !f->p_count && !f->s_count && (s64)(now - f->last_ns) > (s64)idle_limit(f) &&
	    may_pass(f, now)) {
		f->flags = 0;
		gone = true;
	}
	bpf_spin_unlock(&f->lock);
	if (!gone)
		return false;
	/* Until the reference is gone a packet that finds it sees a dead flow, and is dropped and counted; TCP sends it again. */
	flow_refs.delete(&f->key);
	free_flows.push(&index, 0);
	gauge_add(GAUGE_FLOWS_USED, -1);
	return true;
}

/* Each new flow looks at two old ones, so that the table cleans itself without anybody's help. */
static __always_inline void reclaim_some(u64 now)
{
	u32 which = GAUGE_HAND;
	u64 top = gauge(GAUGE_FLOW_TOP), *hand = gauges.lookup(&which);
	if (!hand || !top)
		return;
#pragma nounroll
	for (int i = 0; i < 2; i++) {
		u64 here = *hand;
		*hand = here + 1 >= top ? 0 : here + 1; /* a race here skips or repeats a look, no more */
		reclaim((u32)here & (MAX_FLOWS - 1), now);
	}
}

/* Makes a flow for `key`. False: the table is full (counted, told), or another CPU made it and lost it again in the meantime. */
static __always_inline bool make_flow(const struct place *at, struct flow_key *key, struct flow_ref *ref, u64 now)
{
	u32 index;

	reclaim_some(now);
	if (free_flows.pop(&index)) {
		drop(at, DROP_NO_FLOW);
		return false;
	}
	struct flow *f = flows.lookup(&index);
	if (!f)
		return false;
	bpf_spin_lock(&f->lock);
	u32 generation = f->generation + 1;
	__builtin_memset(&f->flags, 0, sizeof(*f) - __builtin_offsetof(struct flow, flags));
	f->generation = generation;
	__builtin_memcpy(&f->key, key, sizeof(*key));
	f->flags = FLOW_LIVE;
	f->last_ns = now;
	f->epoch = at->epoch;
	f->p_head = f->p_tail = f->p_urgent = f->p_next = f->s_head = f->s_tail = f->frag_first = NONE;
	bpf_spin_unlock(&f->lock);
	if (generation == 1) /* places come off their stack in order: how many were ever used is the mark, and CPUs can add to it at once */
		gauge_add(GAUGE_FLOW_TOP, 1);
	ref->index = index;
	ref->generation = generation;
	if (!flow_refs.insert(key, ref)) {
		gauge_add(GAUGE_FLOWS_USED, 1);
		u64 used = gauge(GAUGE_FLOWS_USED);
		if (used == MAX_FLOWS - MAX_FLOWS / 4) { /* on the way up, each time */
			at->count->high_waters++;
			tell(at, EVENT_HIGH_WATER, DROP_NO_FLOW, index, key, used, 0, 0);
		}
		return true;
	}
	bpf_spin_lock(&f->lock);
	f->flags = 0;
	bpf_spin_unlock(&f->lock);
	free_flows.push(&index, 0);
	struct flow_ref *first = flow_refs.lookup(key); /* another CPU was first with the same flow */
	if (!first)
		return false;
	*ref = *first;
	return true;
}

static __always_inline bool find_flow(struct flow_key *key, struct flow_ref *ref)
{
	struct flow_ref *r = flow_refs.lookup(key);
	if (!r)
		return false;
	*ref = *r;
	return true;
}


/* A release puts packets into the backlog of one CPU (by their hash); two releasing CPUs keep their order only one after the other. Under the lock. */
static __always_inline bool may_emit(const struct flow *f, u32 cpu, u64 now) { return may_pass(f, now) || f->emit_cpu == cpu; }

/* A packet of the flow leaves. What left so long ago that it counts as lost is not waited for any more: or one lost packet would keep the flow from passing
 * anything directly for ever. (Without a branch: the verifier follows each.) Under the lock. */
static __always_inline void note_emit(struct flow *f, u32 cpu, u64 now)
{
	u32 stale = (s64)(EMIT_STALE_NS - (s64)(now - f->emit_ns)) >> 63; /* all ones, or 0 */

	f->in_flight = (f->in_flight & ~stale) + 1;
	f->emit_cpu = cpu;
	f->emit_ns = now;
}

/* Has a commit come that the flow does not know yet? (A program that read the pair's word just before may be behind the flow instead.) */
static __always_inline bool behind(const struct flow *f, u32 epoch) { return (s32)(epoch - f->epoch) > 0; }

/* A commit has come for this flow: both VMs are equal where the PVM stood. What is still held from before may leave (releasable()), and takes the
 * stream's position along when it does; what the old SVM said is void. By whoever holds the lock, with nobody else the owner. */
static __always_inline void rebase(struct flow *f, u32 epoch)
{
	f->epoch = epoch;
	f->flags &= ~(FLOW_DIVERGED | FLOW_LATE | FLOW_TOLD | FLOW_SEEK | FLOW_FRESH | FLOW_RUNS | FLOW_DUP);
	f->matched = f->s_next = f->proven;
	f->p_next = f->p_head; /* matching skips what is committed */
	f->svm_isn = f->pvm_isn;
	/* The new SVM has received what the PVM had, and no more, however far the old one was. */
	f->s_ack = f->p_ack;
	f->s_win = f->p_win;
	f->flags = (f->flags & ~FLOW_S_ACK) | (f->flags & FLOW_C_ACK ? FLOW_S_ACK : 0);
	__builtin_memset(f->s_sack, 0, sizeof(f->s_sack));
}
