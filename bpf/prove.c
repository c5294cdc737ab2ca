/* The primary's forward link: the SVM's output arrives, proves what is held or is parked because it is ahead. P3 and P4 of docs/design.md. */

/* P3, XDP on fwd behind bpf/link.c: the SVM's output arrives. Parses, hashes, finds the flow, and hands all that on in the metadata. */
int p3_arrive(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct arrival *a = (void *)(long)ctx->data_meta;
	u32 zero = 0, len = end - data;
	struct view v = {.data = data, .end = end};
	struct flow_ref ref = {.index = NONE};
	struct place at;

	if ((void *)(a + 1) > data)
		return XDP_DROP;
	struct hash_keys *keys = hash_keys.lookup(&zero);
	if (!keys || !place_of_id(&at, a->nic))
		return XDP_DROP;
	at.count->svm_packets++;
	at.count->svm_bytes += len;
	if (at.state != LOCKSTEP) {
		drop(&at, at.state == CHECKPOINTING ? DROP_OLD_EPOCH : DROP_STATE);
		return XDP_DROP;
	}
	u8 *eth = peek(&v, 0, 14);
	if (!eth) {
		drop(&at, DROP_SHORT);
		return XDP_DROP;
	}
	if (!from_guest(at.nic, eth)) {
		drop(&at, DROP_FOREIGN_MAC);
		return XDP_DROP;
	}
	struct scratch *notes = fresh_scratch(&at);
	if (!notes)
		return XDP_DROP;
	struct packet *p = &notes->packet;
	struct held *h = &notes->held;
	parse(&v, p, len, false);
	u32 policy = policy_of(at.nic, p);
	if (policy != POLICY_COMPARE || is_exempt(at.nic, &p->key)) {
		at.count->svm_swallowed++; /* the PVM's goes out, or is dropped, without it */
		return XDP_DROP;
	}
	u64 now = bpf_ktime_get_ns();
	/* Fresh pointers: what the verifier knows of the old ones depends on the way through parse(), and it would follow each of them. */
	v.data = (void *)(long)ctx->data;
	v.end = (void *)(long)ctx->data_end;
	if (!note_extra(notes, &v, keys, len) || !describe(h, notes, &v, keys, at.epoch, now)) {
		drop(&at, DROP_TOO_LONG);
		return XDP_DROP;
	}
	if (!find_flow(&p->key, &ref) && !make_flow(&at, &p->key, &ref, now))
		return XDP_DROP;
	a->digest = h->digest;
	a->flow = ref.index;
	a->generation = ref.generation;
	a->from = h->from;
	a->length = h->end - h->from;
	a->l4 = h->l4;
	a->payload = h->payload;
	a->start = p->key.kind == KIND_TCP ? h->sack : h->start;
	a->type = h->type;
	a->flags = h->flags;
	return XDP_PASS;
}

/* The blocks of the SACK option at `sack` (offset with the tag; 0: none) into the notes. */
static __always_inline void load_sack(struct __sk_buff *skb, struct scratch *notes, u32 sack, u32 tag)
{
	u8 len = 0;
	__builtin_memset(notes->sack, 0, sizeof(notes->sack));
	if (!sack || bpf_skb_load_bytes(skb, sack - tag + 1, &len, 1))
		return;
#pragma nounroll
	for (u32 i = 0; i < 4; i++) {
		u32 edges[2];
		if (2 + 8 * (i + 1) > len || bpf_skb_load_bytes(skb, sack - tag + 2 + 8 * i, edges, 8))
			break;
		notes->sack[2 * i] = bpf_ntohl(edges[0]);
		notes->sack[2 * i + 1] = bpf_ntohl(edges[1]);
	}
}

/* Has the SVM missed what the client has sent last? It repeats what was acknowledged, or a probe of the client's window begins below it. */
static __always_inline u32 wants_answer(const struct flow *f, const struct held *s)
{
	u32 acks = s->flags & HELD_ACKS, known = f->flags & FLOW_CLIENT;

	if (s->type == HELD_RST)
		return 0;
	if (f->flags & FLOW_CLIENT_RST)
		return acks ? ANSWER_RST : 0;
	if (!acks || !known)
		return 0;
	if (s->type != HELD_SYN)
		return seq_lt(s->from, f->client_ack) ? ANSWER_ACK | ANSWER_OLD : 0;
	return (f->flags & FLOW_SVM_SYN) && f->svm_isn == s->from && seq_lt(f->pvm_isn, f->client_ack) ? ANSWER_SYN : 0;
}

/* Parks the SVM's record `index`: the PVM hasn't come that far. */
static __always_inline u32 s_park(struct flow *f, struct held_table *t, const struct held *s, u32 index, struct answer *a, bool stream)
{
	if (stream && !f->s_count) { /* until now nothing was parked */
		f->s_next = f->matched;
		f->flags &= ~FLOW_RUNS;
	}
	bool linked = s_insert(f, t, index, stream);
	if (stream && s->type == HELD_DATA && s->epoch == f->epoch) {
		if (linked && !(f->flags & FLOW_RUNS) && seq_le(s->from, f->s_next)) { /* ahead, but no hole */
			if (seq_lt(f->s_next, s->end)) {
				f->s_next = s->end;
				f->s_next_tail = index;
			}
		} else if (linked) {
			a->what |= ANSWER_RUN;
			a->record = index;
			a->era = f->s_era;
		} else if (f->flags & FLOW_RUNS) {
			a->what |= ANSWER_ACK; /* it was here: the SVM has not heard that */
		}
	}
	if (!linked)
		return TAKE_SWALLOW;
	if (f->owner) {
		f->work = 1;
	} else if (f->p_count && (s->type <= HELD_ACK ? !(f->flags & FLOW_DIVERGED) : releasable(f, record(t, f->p_head)))) {
		f->owner = 1;
		return TAKE_DRAIN | TAKE_PARKED;
	}
	return TAKE_SWALLOW | TAKE_PARKED;
}

/* `index`: a slot for it with the record filled in, or NONE: TAKE_STORE then asks for one. With TAKE_PARKED it is linked. */
static __always_inline u32 s_take(struct flow *f, struct held_table *t, const struct place *at, u32 generation, const struct held *s, u32 index, u64 now,
				  struct scratch *notes, u32 *used, struct release *out, bool stream)
{
	u32 take = TAKE_SWALLOW;
	bool low = slab_low();

	bpf_spin_lock(&f->lock);
	low = forget_here(f, low);
	if (same_flow(f, generation)) {
		f->last_ns = now;
		if (behind(f, at->epoch) && !f->owner && (!stream || (!f->p_count && !f->s_count)))
			rebase(f, at->epoch);
		if ((s32)(f->epoch - at->epoch) > 0) {
			take = TAKE_SWALLOW; /* a commit came while this one was on its way: it is the old SVM's */
		} else if (!stream) {
			take = s_take_datagram(f, t, s, now, used, out);
			if (take == TAKE_STORE && low)
				take = TAKE_FULL;
			if (take == TAKE_SWALLOW)
				take = drain_or(f, t, take, false); /* what was held before a commit may leave now */
		} else if (f->epoch != at->epoch && s->type == HELD_ACK) {
			note_svm_ack(f, s); /* is no piece of the stream: nothing to keep */
		} else if (f->epoch != at->epoch) {
			take = low ? TAKE_FULL : TAKE_STORE; /* a commit is not through for this flow yet; the owner sorts it out */
		} else {
			notes->answer.what = wants_answer(f, s);
			note_svm_dup(f, s, notes->sack);
			if ((s->flags & HELD_ACKS) && (notes->sack[0] | notes->sack[1] | f->s_sack[0] | f->s_sack[1])) /* neither has blocks as a rule */
				__builtin_memcpy(f->s_sack, notes->sack, sizeof(f->s_sack));
			take = s_take_stream(f, t, s, low, now, out);
			if ((s->flags & HELD_ACKS) && s->ack == f->s_ack)
				f->s_ecr = notes->answer.ts_ecr;
		}
		if (take == TAKE_STORE && index != NONE)
			take = s_park(f, t, s, index, &notes->answer, stream);
	}
	bpf_spin_unlock(&f->lock);
	return take;
}

/* The SVM's packet proved the PVM's first record and nothing else, which is unlinked: the same bytes from the same position on. So only the head is
 * overwritten; the payload stays. */
static __always_inline int release_twin(struct __sk_buff *skb, const struct place *at, struct scratch *notes, struct flow *f, struct held_table *t, u32 flow,
					const struct held *s, const struct release *out)
{
	u32 index = out->index, id = at->nic->id;
	struct slot *slot = slab.lookup(&index);
	struct held *h = record(t, index);
	struct histogram *waited = holding.lookup(&id);
	if (!slot || !waited)
		return VERDICT_DROP;
	count_release(at, waited, h, notes->now);
	at->count->compared_packets++;
	at->count->compared_bytes += h->len - h->payload;
	note_timestamps(f, slot, h);
	if ((h->flags & HELD_ACKS) && (h->ack != out->ack || h->win != out->win)) {
		lower(slot, h, out->ack, out->win);
		at->count->lowered++;
	}
	u32 head = h->payload, len = h->len, size = h->end - h->start - !!(h->flags & HELD_FIN);
	bool sent;
	/* Nothing else may be in either frame: what stands behind the payload is not compared, so it must be the PVM's. */
	u32 differ = (s->start ^ h->start) | (head ^ s->payload) | (skb->len ^ len) | (len ^ (head + size)) | skb->vlan_present;
	bool ported = f->key.kind == KIND_TCP || f->key.kind == KIND_UDP; /* what isn't compared is all in front of the payload */
	if (forget(notes, 0, ported && !differ) && head) {
		head -= 1; /* never zero: the helper's demand */
		BOUND(head, SLOT_BYTES - 1);
		head += 1;
		sent = !bpf_skb_store_bytes(skb, 0, slot->byte, head, 0);
		if (sent)
			dress(skb, at, h, flow, f->generation);
	} else {
		sent = load_vessel(skb, at, slot, h, flow, f->generation, 0);
	}
	give_slot(index);
	if (!sent)
		drop(at, DROP_EMIT);
	if (out->more) { /* this program is the flow's owner */
		skb->cb[CB_FLOW] = flow;
		skb->cb[CB_MODE] = 0;
		skb->cb[CB_OWN] = 0;
		skb->cb[CB_STAGED] = sent;
		skb->cb[CB_PARTIAL] = 0;
		tc_stages.call(skb, STAGE_DRAIN);
	}
	return sent ? bpf_redirect(at->nic->vif, BPF_F_INGRESS) : VERDICT_DROP;
}

/* P4, tc ingress of fwd: the SVM's packet proves what is held, or is parked because it is ahead. No frame goes on from here to the stack. Two programs,
 * for what is a piece of a `stream` and for what isn't: the verifier could not follow both in one. */
static __always_inline int prove_packet(struct __sk_buff *skb, bool stream)
{
	struct arrival *a = (void *)(long)skb->data_meta;
	u32 zero = 0, used = NONE, index = NONE;
	struct place at;
	struct held s = {};

	if ((void *)(a + 1) > (void *)(long)skb->data)
		return VERDICT_DROP; /* bpf/link.c has counted it */
	struct held_table *t = held.lookup(&zero);
	u32 flow = a->flow, generation = a->generation;
	struct flow *f = flows.lookup(&flow);
	if (!t || !f || !place_of_id(&at, a->nic))
		return VERDICT_DROP;
	if (at.state != LOCKSTEP) {
		drop(&at, DROP_OLD_EPOCH);
		return VERDICT_DROP;
	}
	struct scratch *notes = scratch.lookup(&zero);
	if (!notes)
		return VERDICT_DROP;
	u64 now = notes->now = bpf_ktime_get_coarse_ns();
	s.next = NONE;
	s.flow = flow;
	s.digest = a->digest;
	s.from = a->from;
	s.end = a->from + a->length;
	s.start = a->type == HELD_FRAGMENT ? a->start : a->from;
	s.type = a->type;
	if (stream != (s.type <= HELD_ACK))
		return VERDICT_DROP; /* never: bpf/link.c chooses by the type */
	u32 a_sack = a->start;
	s.flags = a->flags;
	s.l4 = a->l4;
	s.payload = a->payload;
	s.since_ns = now;
	s.epoch = at.epoch;
	if (!stream && s.type == HELD_FRAGMENT) { /* its record sums the datagram up: bytes so far, and the length once it is known */
		s.from = a->length;
		s.ack = s.flags & HELD_LAST ? s.end : 0;
		if (s.ack && s.ack == s.from)
			s.flags |= HELD_WHOLE;
	}
	notes->answer.what = 0;
	notes->answer.ts_val = notes->answer.ts_ecr = 0;
	if (stream && (s.flags & HELD_ACKS)) {
		u32 off_tag = skb->vlan_present ? 4 : 0, off = s.l4 - off_tag;
		u32 *tcp = notes->cell; /* ACK, then flags and window; by way of the map, see forget() */
		BOUND(off, MAX_FRAME);
		u32 *there = (void *)(long)skb->data + off + 8;
		if ((void *)(there + 2) <= (void *)(long)skb->data_end) {
			tcp[0] = there[0];
			tcp[1] = there[1];
			if (s.payload >= s.l4 + 20 + STAMPS_LEN && (void *)(there + 6) <= (void *)(long)skb->data_end && there[3] == bpf_htonl(STAMPS)) {
				notes->answer.ts_val = bpf_ntohl(there[4]);
				notes->answer.ts_ecr = bpf_ntohl(there[5]);
			}
		} else if (bpf_skb_load_bytes(skb, off + 8, tcp, 8)) {
			return VERDICT_DROP;
		}
		s.ack = bpf_ntohl(*(volatile u32 *)tcp);
		s.win = bpf_ntohl(*(volatile u32 *)(tcp + 1)) & 0xffff;
		load_sack(skb, notes, a_sack, off_tag);
	}
	/* Is the SVM ahead, as far as can be seen without the lock? Then a slot is made ready, and the lock is needed once. */
	bool ready = s.type != HELD_ACK && (skb->cb[CB_READY] || (stream ? f->p_next : f->p_head) == NONE);
	if (ready) {
		index = take_slot(&at);
		struct slot *slot = slab.lookup(&index);
		if (slot) {
			s.len = s.type == HELD_DATA ? load_slot(skb, slot) : 0; /* only of a stream are the bytes needed again */
			*record(t, index) = s;
		}
	}
	index = forget(notes, 4, index);
	s.len = forget(notes, 5, s.len);
	struct release *out = &notes->release;
	out->cpu = bpf_get_smp_processor_id();
	notes->answer.seq = s.ack;
	notes->answer.from = s.from;
	notes->answer.end = s.end;
	u32 take = s_take(f, t, &at, generation, &s, index, now, notes, &used, out, stream);
	take = forget(notes, 6, take);
	used = forget(notes, 7, used);
	if (take == TAKE_STORE) {
		if (ready) { /* no slot is left */
			watch_slab(&at);
			return VERDICT_DROP;
		}
		skb->cb[CB_READY] = 1; /* it isn't ahead: once more, with a slot */
		tc_stages.call(skb, stream ? STAGE_P4 : STAGE_P4_DATAGRAM);
		return VERDICT_DROP;
	}
	if (take & TAKE_PARKED) {
		take &= ~TAKE_PARKED;
		at.count->svm_parked++;
		watch_slab(&at);
	} else {
		if (index != NONE)
			give_slot(index);
		if (take == TAKE_FULL)
			drop(&at, DROP_FIFO_FULL);
		else
			at.count->svm_swallowed++;
	}
	if (used != NONE) {
		at.count->svm_unparked++;
		give_slot(used);
	}
	if (take == TAKE_RELEASE || take == TAKE_PARTIAL || take == TAKE_DRAIN)
		notes->now = bpf_ktime_get_ns(); /* the finer clock: how long it was held is counted */
	if (take == TAKE_RELEASE)
		return release_twin(skb, &at, notes, f, t, flow, &s, out);
	skb->cb[CB_FLOW] = flow;
	if (stream && notes->answer.what) {
		skb->cb[CB_MODE] = take;
		tc_stages.call(skb, STAGE_ANSWER);
	}
	return p4_goes_on(skb, take);
}

int p4_prove(struct __sk_buff *skb) { return prove_packet(skb, true); }
int p4_datagram(struct __sk_buff *skb) { return prove_packet(skb, false); }
