/* Everything that is not TCP: a multiset of digests per flow, released in the PVM's order. Of fragments the PVM's are held one by one, the SVM's
 * are summed up in one record per datagram; the digest of a datagram is the sum of its byte ranges', so borders may differ. It joins the multiset
 * when its ranges are all there. (A fragment that the SVM's network doubles never adds up: that waits for a checkpoint.) Under the flow's lock. */

/* In a whole datagram's records `ack` is its length. */
static __always_inline bool same_datagram(const struct held *p, const struct held *s)
{
	u64 differ = (p->digest ^ s->digest) | (p->epoch ^ s->epoch) | (p->type ^ s->type);
	if (differ)
		return false;
	return p->type == HELD_DATAGRAM ? p->end == s->end : (p->flags & s->flags & HELD_WHOLE) && p->ack == s->ack;
}

/* Both are fragments of one datagram that is not whole yet. (One branch: the verifier counts them.) */
static __always_inline bool same_id(const struct held *a, const struct held *b)
{
	return !((a->type ^ HELD_FRAGMENT) | (a->start ^ b->start) | (a->epoch ^ b->epoch) | (a->flags & HELD_WHOLE));
}

/* PVM fragment `h`, record `index`, is linked: when its datagram is whole, gives the datagram's digest to all its fragments. They follow each other as
 * a rule: once the first of a datagram has come alone, the search begins there, however long the list before it is. */
static __always_inline bool p_complete(struct flow *f, struct held_table *t, u32 index, struct held *h)
{
	bool known = f->frag_first != NONE && f->frag_id == h->start;
	u32 first = known ? f->frag_first : f->p_head, here = first, have = forget_here(f, 0), total = forget_here(f, 0);
	u64 sum = forget_here(f, 0);

#pragma nounroll
	for (int i = 0; i < WALK; i++) {
		if (here == NONE)
			break;
		struct held *r = record(t, here);
		if (same_id(r, h) && !(r->flags & HELD_DOUBLE)) {
			if (r != h && !((r->from ^ h->from) | (r->end ^ h->end) | (r->digest ^ h->digest))) {
				h->flags |= HELD_DOUBLE; /* the same frame twice: leaves with its twin, counts once */
				return false;
			}
			have += r->end - r->from;
			sum += r->digest;
			if (r->flags & HELD_LAST)
				total = r->end;
		}
		here = r->next;
	}
	if (!known && h->from == 0) {
		f->frag_first = have <= h->end ? index : NONE; /* nothing of it came before */
		f->frag_id = h->start;
	}
	if (!total || have != total)
		return false;
	here = first;
#pragma nounroll
	for (int i = 0; i < WALK; i++) {
		if (here == NONE)
			break;
		struct held *r = record(t, here);
		if (same_id(r, h)) {
			r->flags |= HELD_WHOLE;
			r->digest = sum;
			r->ack = total;
		}
		here = r->next;
	}
	return true;
}

/* Adds SVM fragment `s` to its datagram's record, if there is one. NONE: there is none. */
static __always_inline u32 s_merge(struct flow *f, struct held_table *t, const struct held *s)
{
	u32 here = f->s_head;

#pragma nounroll
	for (int i = 0; i < WALK; i++) {
		if (here == NONE)
			return NONE;
		struct held *r = record(t, here);
		if (same_id(r, s)) {
			r->from += s->from;
			r->digest += s->digest;
			if (s->flags & HELD_LAST)
				r->ack = s->ack;
			if (r->ack == r->from)
				r->flags |= HELD_WHOLE;
			return here;
		}
		here = r->next;
	}
	return NONE;
}

/* Proves the PVM's first unproven datagram that equals `s`; fragments of one share an identification. */
static __always_inline bool prove_equal(struct flow *f, struct held_table *t, const struct held *s)
{
	u32 here = f->p_head, id = 0;
	bool found = false;

#pragma nounroll
	for (int i = 0; i < WALK; i++) {
		if (here == NONE)
			break;
		struct held *r = record(t, here);
		if (!(r->flags & HELD_PROVEN) && same_datagram(r, s) && (!found || r->start == id)) {
			prove(f, r);
			found = true;
			id = r->start;
			if (r->type == HELD_DATAGRAM)
				break;
		}
		here = r->next;
	}
	return found;
}

/* Unlinks the SVM's first record that equals `p`. NONE: there is none. */
static __always_inline u32 use_equal(struct flow *f, struct held_table *t, const struct held *p, int walk)
{
	u32 here = f->s_head, before = NONE;

#pragma nounroll
	for (int i = 0; i < walk; i++) {
		if (here == NONE)
			return NONE;
		struct held *r = record(t, here);
		if (same_datagram(p, r)) {
			if (before == NONE)
				f->s_head = r->next;
			else
				record(t, before)->next = r->next;
			if (f->s_tail == here)
				f->s_tail = before;
			f->s_count--;
			return here;
		}
		before = here;
		here = r->next;
	}
	return NONE;
}

/* A PVM datagram or fragment, its record filled in. `*used`: a slot of the SVM's that it used up. (What is not `single` is a datagram.) */
static __always_inline u32 p_take_datagram(struct flow *f, struct held_table *t, u32 index, struct held *h, u64 now, bool single, u32 *used)
{
	bool alone = forget_here(f, single && !f->p_count && !f->owner && may_pass(f, now)), diverged = f->flags & FLOW_DIVERGED;

	if (f->p_count >= MAX_FIFO)
		return TAKE_FULL;
	if (!single || h->type == HELD_DATAGRAM) {
		if (f->s_head != NONE && !diverged)
			*used = use_equal(f, t, h, single ? WALK : WALK / 4);
		if (*used != NONE) {
			if (alone)
				return TAKE_PASS;
			h->flags |= HELD_PROVEN;
		}
		p_append(f, t, index);
	} else {
		p_append(f, t, index);
		if (!diverged && p_complete(f, t, index, h) && f->s_head != NONE) {
			*used = use_equal(f, t, h, WALK);
			if (*used != NONE)
				prove_equal(f, t, record(t, *used));
		}
	}
	if (f->owner) {
		f->work = 1;
		return TAKE_HOLD;
	}
	if (single && *used != NONE && f->p_head != NONE && releasable(f, record(t, f->p_head))) {
		f->owner = 1; /* fragments that leave together with this one */
		return TAKE_DRAIN;
	}
	return TAKE_HOLD;
}

/* An SVM datagram or fragment, not stored yet. `*used`: a parked slot that it used up. */
static __always_inline u32 s_take_datagram(struct flow *f, struct held_table *t, const struct held *s, u64 now, u32 *used, struct release *out)
{
	if (f->flags & FLOW_DIVERGED)
		return TAKE_SWALLOW;
	struct held *first = record(t, f->p_head);
	if (s->type == HELD_DATAGRAM && f->p_head != NONE && !f->owner && !(first->flags & HELD_PROVEN) && same_datagram(first, s) && may_emit(f, out->cpu, now)) {
		prove(f, first);
		return release_first(f, t, first, now, out, false);
	}
	if (s->type == HELD_FRAGMENT) {
		u32 merged = s_merge(f, t, s);
		if (merged != NONE) {
			struct held *r = record(t, merged);
			if (!(r->flags & HELD_WHOLE) || !prove_equal(f, t, r))
				return TAKE_SWALLOW;
			*used = use_equal(f, t, r, WALK); /* itself, or its twin */
			return drain_or(f, t, TAKE_SWALLOW, false);
		}
	} else if (prove_equal(f, t, s)) {
		return drain_or(f, t, TAKE_SWALLOW, false);
	}
	return f->s_count >= MAX_FIFO ? TAKE_FULL : TAKE_STORE;
}
