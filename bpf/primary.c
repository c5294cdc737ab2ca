/* The primary's hooks on the vif: P1 and P2 of docs/design.md. What the SVM's output does when it arrives is in bpf/prove.c. */

/* Keeps what the client says last, for when the copy on fwd is lost (bpf/answer.c). It makes no flow: before the guest's first packet nothing is to be
 * kept, and what a full table refuses is refused on both ways. The client can't have acknowledged what has not left, and what its stack would not look at
 * (all of it older than the PVM's ACK) is not believed here either. */
static __always_inline void note_client(struct __sk_buff *skb, const struct place *at)
{
	struct view v = look(skb);
	struct scratch *notes = fresh_scratch(at);
	u32 val = 0, ecr = 0;
	bool stamped = false;

	if (!notes)
		return;
	struct packet *p = &notes->packet;
	struct flow_ref *ref = &notes->ref;
	parse(&v, p, skb->len, true);
	if (p->key.kind != KIND_TCP)
		return;
	tag_beside(skb, p);
	if (!find_flow(&p->key, ref))
		return;
	struct flow *f = flows.lookup(&ref->index);
	if (!f)
		return;
	u8 flags = p->tcp_flags;
	if (p->options >= STAMPS_LEN) {
		u32 *o = peek(&v, p->l4 + 20, STAMPS_LEN);
		if (o && o[0] == bpf_htonl(STAMPS)) {
			stamped = true;
			val = bpf_ntohl(o[1]);
			ecr = bpf_ntohl(o[2]);
		} else {
			stamped = timestamps(&v, p, &val, &ecr);
		}
	}
	u32 end = p->seq + p->length + (flags & TCP_FIN);
	bpf_spin_lock(&f->lock);
	if (!same_flow(f, ref->generation)) {
		/* another one's place by now */
	} else if (flags & TCP_SYN) { /* the ports are used again, maybe */
		f->flags &= ~(FLOW_CLIENT | FLOW_CLIENT_FIN | FLOW_CLIENT_RST);
	} else if (flags & TCP_RST) {
		f->flags |= FLOW_CLIENT_RST;
		f->client_rst = p->seq;
	} else if ((flags & TCP_ACK) && (f->flags & FLOW_BASED) && seq_le(p->ack, f->matched) && !((f->flags & FLOW_C_ACK) && seq_lt(end, f->c_ack)) &&
		   !((f->flags & FLOW_CLIENT) && seq_lt(p->ack, f->client_ack))) {
		f->flags = (f->flags & ~FLOW_CLIENT_TS) | FLOW_CLIENT | (stamped ? FLOW_CLIENT_TS : 0);
		f->client_ack = p->ack;
		f->client_win = p->win;
		f->client_ts_val = val;
		f->client_ts_ecr = ecr;
		if (flags & TCP_FIN) {
			f->flags |= FLOW_CLIENT_FIN;
			f->client_end = end;
		}
	}
	bpf_spin_unlock(&f->lock);
}

/* Every frame for the PVM goes to the SVM too. */
static __always_inline int mirror(struct __sk_buff *skb, struct place *at)
{
	if (at->state != LOCKSTEP && at->state != CHECKPOINTING && at->state != SYNCING)
		return VERDICT_PASS;
	if (at->state != SYNCING)
		note_client(skb, at);
	at->count->mirrored_packets++;
	at->count->mirrored_bytes += skb->len;
	if (!at->nic->vlan) {
		if (bpf_clone_redirect(skb, at->nic->fwd, 0))
			drop(at, DROP_EMIT);
		return VERDICT_PASS;
	}
	if (bpf_skb_vlan_push(skb, bpf_htons(ETH_P_8021Q_), at->nic->vlan)) {
		drop(at, DROP_EMIT);
		return VERDICT_PASS;
	}
	if (bpf_clone_redirect(skb, at->nic->fwd, 0))
		drop(at, DROP_EMIT);
	bpf_skb_vlan_pop(skb);
	return VERDICT_PASS;
}

/* P1, tc egress of the vif: what the bridge has for the PVM. */
int p1_mirror(struct __sk_buff *skb)
{
	struct place at;
	if (!place_of_vif(&at, skb->ifindex))
		return VERDICT_PASS;
	if (!at.aliased)
		return mirror(skb, &at);
	tc_stages.call(skb, STAGE_P1_ALIAS);
	return VERDICT_DROP; /* never: it is this run's first call */
}

/* Copies the frame, with the tag that the kernel keeps beside it, into a slot. Returns the bytes there (no more than the slot takes) or 0. */
static __always_inline u32 load_slot(struct __sk_buff *skb, struct slot *slot)
{
	u32 len = skb->len, off = 0, from = 0;

	if (skb->vlan_present) {
		if (bpf_skb_load_bytes(skb, 0, slot->byte, 12))
			return 0;
		*(u16 *)(slot->byte + 12) = skb->vlan_proto; /* network order, as it stands in the frame */
		*(u16 *)(slot->byte + 14) = bpf_htons(skb->vlan_tci);
		from = 12;
		off = 16;
		len -= 12;
	}
	if (len > SLOT_BYTES - 65)
		len = SLOT_BYTES - 65;
	if (len < 2)
		return 0;
	len -= 1; /* never zero: the helper's demand */
	BOUND(len, SLOT_BYTES - 1);
	len += 1;
	if (off) {
		if (bpf_skb_load_bytes(skb, from, slot->byte + 16, len))
			return 0;
	} else {
		if (bpf_skb_load_bytes(skb, 0, slot->byte, len))
			return 0;
	}
	return off + len;
}

#define SUM_WHOLE 0u
#define SUM_OPEN 1u
#define SUM_EITHER 2u

/* A held packet must carry a whole checksum: the vessel's is final. A guest with offloads leaves the pseudo-header's sum there; then, and only then,
 * it is filled in. (A packet with a wrong checksum that happens to be that sum is mended: 1 in 65,536 of wrong ones.) Of 1 in 65,535 packets the whole
 * checksum equals that sum: SUM_EITHER. */
static __always_inline u32 fill_checksum(struct slot *slot, const struct packet *p, u32 len)
{
	u32 off = p->l4_check, l4 = p->l4, l4_len = p->payload - p->l4 + p->length;

	if (!off || off > SLOT_BYTES - 64 || l4 > SLOT_BYTES - 64 || len > SLOT_BYTES - 64)
		return SUM_WHOLE;
	BOUND(off, SLOT_BYTES - 1);
	u16 *check = (u16 *)(slot->byte + off);
	u16 there = *check;
	if (there != fold(pseudo_sum(&p->key, l4_len)) || there == 0)
		return SUM_WHOLE;
	u32 end = l4 + l4_len;
	if (end > SLOT_BYTES - 64)
		return SUM_WHOLE;
	BOUND(end, SLOT_BYTES - 1);
	*(u32 *)(slot->byte + end) = 0; /* behind the last byte: the sum goes by fours */
	u16 sum = ~fold(slot_sum(slot, l4, l4_len)); /* the pseudo-header's sum is in it already */
	sum = sum ? sum : 0xffff;
	*check = sum;
	return sum == there ? SUM_EITHER : SUM_OPEN;
}

/* The packet goes on as it is, but for ACK and window. */
static __always_inline int pass_original(struct __sk_buff *skb, const struct place *at, const struct held *h, u32 ack, u16 win)
{
	u32 tcp = h->l4 - (skb->vlan_present ? 4 : 0);

	if (!(h->flags & HELD_ACKS))
		return VERDICT_PASS;
	if (ack != h->ack) {
		u32 old = bpf_htonl(h->ack), new = bpf_htonl(ack);
		if (bpf_l4_csum_replace(skb, tcp + 16, old, new, 4) || bpf_skb_store_bytes(skb, tcp + 8, &new, 4, 0))
			return VERDICT_DROP;
	}
	if (win != h->win) {
		u16 old = bpf_htons(h->win), new = bpf_htons(win);
		if (bpf_l4_csum_replace(skb, tcp + 16, old, new, 2) || bpf_skb_store_bytes(skb, tcp + 14, &new, 2, 0))
			return VERDICT_DROP;
	}
	if (ack != h->ack || win != h->win)
		at->count->lowered++;
	return VERDICT_PASS;
}

/* Where the transport header of the flow's packets is; with IP options or extension headers that isn't known (0). */
static __always_inline u32 usual_l4(const struct flow_key *key)
{
	bool ip4 = key->guest[2] == bpf_htonl(0xffff) && !key->guest[0] && !key->guest[1];
	return key->extra ? 0 : 14 + (key->vlan[0] ? 4 : 0) + (key->vlan[1] ? 4 : 0) + (ip4 ? 20 : 40);
}

/* A released packet comes back through the vif: it goes on to the bridge. If others of its flow had to wait for it, this CPU sends them now. */
static __always_inline int come_back(struct __sk_buff *skb, const struct place *at)
{
	u32 index = skb->mark & FLOW_MASK, tag = skb->tc_index, zero = 0;
	struct flow *f = index < MAX_FLOWS ? flows.lookup(&index) : NULL;
	struct held_table *t = held.lookup(&zero);
	bool drains = false, stuck = false;

	if (tag & TAG_WALK) {
		tc_stages.call(skb, STAGE_LET_GO);
		return VERDICT_DROP;
	}
	at->count->reentered++;
	if (at->state == HALTED) { /* the right to speak ended while it was on its way */
		drop(at, DROP_HALTED);
		return VERDICT_DROP;
	}
	if (f && t) {
		bpf_spin_lock(&f->lock);
		if ((f->flags & FLOW_LIVE) && !((f->generation ^ tag) & TAG_GENERATION) && f->in_flight) {
			f->in_flight--;
			if (f->work || (f->p_head != NONE && (at->state == PASSTHROUGH || releasable(f, record(t, f->p_head))))) {
				if (f->owner) {
					f->work = 1;
				} else if (!f->in_flight && (tag & TAG_OPEN_SUM) && f->key.extra) {
					f->work = 1; /* usual_l4() doesn't know where its checksum is: it can carry nothing else */
					stuck = true;
				} else if (!f->in_flight) {
					f->owner = 1;
					drains = true;
				}
			}
		}
		bpf_spin_unlock(&f->lock);
	}
	if (stuck) {
		at->count->kicks++;
		tell(at, EVENT_KICK, 0, index, &f->key, 0, 0, 0);
	}
	if (drains) { /* mark and tc_index stay for the clone */
		u32 zero_key = 0;
		struct scratch *notes = scratch.lookup(&zero_key);
		if (notes)
			notes->now = bpf_ktime_get_ns();
		skb->cb[CB_FLOW] = index;
		skb->cb[CB_MODE] = MODE_CLONE_FIRST | (tag & TAG_OPEN_SUM ? MODE_PARTIAL : 0);
		skb->cb[CB_OWN] = 0;
		skb->cb[CB_STAGED] = 0;
		skb->cb[CB_PARTIAL] = usual_l4(&f->key);
		tc_stages.call(skb, STAGE_DRAIN);
	}
	skb->mark = 0;
	skb->tc_index = 0;
	return to_client(skb, at);
}

/* Looks after a flow's own high-water mark and its oldest packet. */
static __always_inline void watch_flow(const struct place *at, struct flow *f, struct held_table *t, u32 index, u64 now)
{
	u32 head = f->p_head;
	if (f->p_count >= FIFO_HIGH && !(f->flags & FLOW_TOLD)) {
		bpf_spin_lock(&f->lock);
		f->flags |= FLOW_TOLD;
		bpf_spin_unlock(&f->lock);
		at->count->high_waters++;
		tell(at, EVENT_HIGH_WATER, DROP_FIFO_FULL, index, &f->key, f->p_count, 0, 0);
	}
	if (head != NONE && !(f->flags & FLOW_LATE) && (s64)(now - record(t, head)->since_ns) > compare_timeout(at)) {
		bpf_spin_lock(&f->lock);
		f->flags |= FLOW_LATE;
		bpf_spin_unlock(&f->lock);
		at->count->timeouts++;
		tell(at, EVENT_TIMEOUT, REASON_MISSING_SVM, index, &f->key, record(t, head)->from, record(t, head)->digest, 0);
	}
}

/* What a packet of this host's own making needs. Written only if it is new: the line is the other CPU's too. */
static __always_inline void note_sender(struct flow *f, u32 hash, const u8 *eth)
{
	if (f->hash != hash)
		f->hash = hash;
	if (*(u16 *)f->remote_mac != *(u16 *)eth || *(u32 *)(f->remote_mac + 2) != *(u32 *)(eth + 2))
		__builtin_memcpy(f->remote_mac, eth, 6);
	if (*(u16 *)f->guest_mac != *(u16 *)(eth + 6) || *(u32 *)(f->guest_mac + 2) != *(u32 *)(eth + 8))
		__builtin_memcpy(f->guest_mac, eth + 6, 6);
}

/* Is something of the flow still held, or on its way out? What comes now has to stay behind it. */
static __always_inline bool holds(const struct flow_ref *ref, u64 now)
{
	u32 index = ref->index;
	struct flow *f = flows.lookup(&index);
	if (!f)
		return false;
	bpf_spin_lock(&f->lock);
	bool any = same_flow(f, ref->generation) && (f->p_count || f->owner || !may_pass(f, now));
	bpf_spin_unlock(&f->lock);
	return any;
}

/* Links record `index` into its flow, or finds that the packet may pass. */
static __always_inline u32 p_take(struct flow *f, struct held_table *t, const struct place *at, const struct flow_ref *ref, u32 index, u64 now, u32 kind,
				  bool single, u32 *ack, u16 *win, u32 *used)
{
	struct held *h = record(t, index);
	u32 take;
	bool moved = false, low = slab_low();

	bpf_spin_lock(&f->lock);
	if (!same_flow(f, ref->generation)) {
		bpf_spin_unlock(&f->lock);
		return TAKE_SWALLOW;
	}
	f->last_ns = now;
	h->flow = ref->index;
	if (behind(f, at->epoch) && !f->owner && at->state == LOCKSTEP && (kind != KIND_TCP || (!f->p_count && !f->s_count))) {
		rebase(f, at->epoch);
		moved = true;
	}
	if (at->state == PASSTHROUGH) {
		h->flags |= HELD_PROVEN; /* behind what is held, if there is any: the flush takes both */
		if (single && !f->p_count && !f->owner && may_pass(f, now)) {
			take = TAKE_PASS;
			*ack = h->ack;
			*win = h->win;
			bpf_spin_unlock(&f->lock);
			return take;
		}
		p_append(f, t, index);
		take = TAKE_HOLD;
		if (f->owner) {
			f->work = 1;
		} else if (single) {
			f->owner = 1;
			take = TAKE_DRAIN;
		}
		bpf_spin_unlock(&f->lock);
		return take;
	}
	if (kind == KIND_TCP ? refuses(f, h, low) : low && !f->s_count) {
		take = TAKE_FULL;
	} else if (at->state != LOCKSTEP || (f->epoch != at->epoch && kind == KIND_TCP)) { /* proves nothing now; keeps its place */
		take = f->p_count >= MAX_FIFO ? TAKE_FULL : TAKE_HOLD;
		if (!(f->flags & FLOW_BASED) && !f->p_count && (h->type == HELD_DATA || h->type == HELD_ACK))
			start_stream(f, h->from); /* as p_take_stream() does; the commit that follows covers it */
		if (take == TAKE_HOLD) {
			if (kind == KIND_TCP)
				note_order(f, h);
			p_append(f, t, index);
			if (f->owner) {
				f->work = 1;
			} else if (at->state == LOCKSTEP && single) {
				f->owner = 1;
				take = TAKE_DRAIN;
			}
		}
	} else if (kind == KIND_TCP) {
		take = p_take_stream(f, t, index, h, now, single, used);
	} else {
		take = p_take_datagram(f, t, index, h, now, single, used);
	}
	if (take == TAKE_PASS) {
		account_release(f, h, ack, win);
	} else if (take == TAKE_HOLD && moved && single && !f->owner) { /* what was held before may leave now */
		f->owner = 1;
		take = TAKE_DRAIN;
	}
	bpf_spin_unlock(&f->lock);
	return take;
}

/* P2, tc ingress of the vif: the PVM's output. */
int p2_output(struct __sk_buff *skb)
{
	u32 zero = 0;
	struct place at;

	if (!place_of_vif(&at, skb->ifindex))
		return VERDICT_PASS;
	if (is_ours(&at, skb->mark))
		return come_back(skb, &at);
	at.count->output_packets++;
	at.count->output_bytes += skb->len;
	if (at.state == UNPROTECTED || at.state == SYNCING) {
		at.count->unprotected++;
		return to_client(skb, &at);
	}
	if (at.state == HALTED || at.state == PROMOTED) {
		drop(&at, DROP_HALTED);
		return VERDICT_DROP;
	}

	u32 index = take_slot(&at);
	if (index == NONE) {
		watch_slab(&at);
		return VERDICT_DROP; /* the newest is refused, never one that was accepted */
	}
	u64 now = bpf_ktime_get_coarse_ns();
	struct slot *slot = slab.lookup(&index);
	if (!slot)
		return VERDICT_DROP;
	u32 tagged = skb->vlan_present ? 4 : 0, len = load_slot(skb, slot);
	struct view v = {.data = slot->byte, .len = len, .slot = true};
	struct scratch *notes = fresh_scratch(&at);
	if (!notes)
		return VERDICT_DROP;
	struct packet *p = &notes->packet;
	struct flow_ref *ref = &notes->ref;
	u32 why = DROP_SHORT;
	u8 *eth = peek(&v, 0, 14);
	if (!eth)
		goto refuse;
	why = DROP_FOREIGN_MAC;
	if (!from_guest(at.nic, eth))
		goto refuse;
	v.part = skb->gso_size; /* the lengths of a super-packet count all its segments */
	parse(&v, p, len, false);

	u32 policy = policy_of(at.nic, p);
	why = DROP_POLICY;
	if (policy == POLICY_DROP)
		goto refuse;
	if (policy == POLICY_PASS) {
		give_slot(index);
		at.count->policy_passed++;
		if (p->class == CLASS_ARP && walk_due(&at)) /* has no checksum that could be open, so it can be a vessel for anything */
			send_walk(skb, &at, 0);
		return VERDICT_PASS;
	}
	if (is_exempt(at.nic, &p->key)) {
		give_slot(index);
		at.count->exempt++;
		return to_client(skb, &at);
	}
	why = DROP_TOO_LONG;
	if (!v.part && len != skb->len + tagged) /* longer than a slot: can't be held, so it can't be taken */
		goto refuse;
	struct hash_keys *keys = hash_keys.lookup(&zero);
	if (!keys || !note_extra(notes, &v, keys, len))
		goto refuse;
	bool known = find_flow(&p->key, ref);
	if (at.state == PASSTHROUGH && (!known || !holds(ref, now))) {
		give_slot(index);
		at.count->unprotected++;
		return to_client(skb, &at);
	}
	if (!known && !make_flow(&at, &p->key, ref, now)) {
		give_slot(index);
		return VERDICT_DROP; /* make_flow() has counted it */
	}
	struct flow *f = flows.lookup(&ref->index);
	why = DROP_FLOW_RACE;
	if (!f)
		goto refuse;
	note_sender(f, skb->hash, eth);
	if (v.part) {
		give_slot(index);
		skb->cb[CB_FLOW] = ref->index;
		skb->cb[CB_GENERATION] = ref->generation;
		skb->cb[CB_OWN] = 0;
		skb->cb[CB_SEGMENT] = 0;
		tc_stages.call(skb, p->key.kind == KIND_TCP ? STAGE_SPLIT : STAGE_SPLIT_UDP);
		return VERDICT_DROP;
	}

	notes->slot = index;
	notes->len = len;
	notes->now = now;
	tc_stages.call(skb, STAGE_HOLD);
refuse:
	give_slot(index);
	drop(&at, why);
	return VERDICT_DROP;
}

/* P2's second half: the packet is in slot `notes->slot`, its flow is known. Hashes it, then holds it or lets it pass. */
int hold(struct __sk_buff *skb)
{
	u32 zero = 0, used = NONE, ack = 0, why = DROP_FLOW_RACE;
	u16 win = 0;
	struct scratch *notes = scratch.lookup(&zero);
	struct held_table *t = held.lookup(&zero);
	struct hash_keys *keys = hash_keys.lookup(&zero);
	struct place at;

	if (!notes || !t || !keys || !place_of_id(&at, notes->packet.key.nic))
		return VERDICT_DROP;
	struct packet *p = &notes->packet;
	struct flow_ref *ref = &notes->ref;
	u32 index = notes->slot, len = notes->len;
	struct slot *slot = slab.lookup(&index);
	struct flow *f = flows.lookup(&ref->index);
	if (!slot || !f)
		return VERDICT_DROP;
	struct held *h = record(t, index);
	struct view v = {.data = slot->byte, .len = len, .slot = true};
	u64 now = notes->now; /* P2 has just read the clock */
	if (f->s_head == NONE) /* it will be held, and for how long is counted: a finer clock, which takes 30 ns to read */
		now = notes->now = bpf_ktime_get_ns();
	describe(h, notes, &v, keys, at.epoch, now);
	h->len = len;
	h->hash = f->hash;
	u32 sum = fill_checksum(slot, p, len);
	if (sum != SUM_EITHER && f->open_sums != sum)
		f->open_sums = sum;
	bool partial = forget(notes, 3, sum == SUM_EITHER ? f->open_sums : sum);
	at.count->segments++;
	u32 take = p_take(f, t, &at, ref, index, now, p->key.kind, true, &ack, &win, &used);
	if (used != NONE) {
		at.count->svm_unparked++;
		give_slot(used);
	}
	if (take == TAKE_PASS) {
		struct held *mine = h;
		note_timestamps(f, slot, mine);
		at.count->released_packets++;
		at.count->released_bytes += len;
		at.count->released_unchanged++;
		if (at.state == PASSTHROUGH || (p->key.kind == KIND_TCP && used == NONE && mine->type == HELD_DATA)) {
			at.count->retransmissions++;
		} else {
			at.count->compared_packets++;
			at.count->compared_bytes += p->length;
		}
		int verdict = pass_original(skb, &at, mine, ack, win);
		give_slot(index);
		return verdict == VERDICT_PASS ? to_client(skb, &at) : verdict;
	}
	if (take == TAKE_SWALLOW || take == TAKE_CLOSED) {
		why = take == TAKE_CLOSED ? DROP_CLOSED : DROP_FLOW_RACE;
		goto refuse;
	}
	if (take == TAKE_FULL) {
		why = DROP_FIFO_FULL;
		watch_flow(&at, f, t, ref->index, now);
		goto refuse;
	}
	at.count->held_packets++;
	watch_slab(&at);
	if (take == TAKE_DRAIN) {
		skb->cb[CB_FLOW] = ref->index;
		skb->cb[CB_MODE] = partial ? MODE_PARTIAL : 0;
		skb->cb[CB_OWN] = h->sack ? 0 : 1; /* with SACK blocks that may have to go it doesn't pass as it came */
		skb->cb[CB_STAGED] = 0;
		skb->cb[CB_PARTIAL] = p->l4;
		tc_stages.call(skb, STAGE_DRAIN);
		return VERDICT_DROP;
	}
	watch_flow(&at, f, t, ref->index, now);
	return VERDICT_DROP; /* the slab has it */
refuse:
	give_slot(index);
	drop(&at, why);
	return VERDICT_DROP;
}

/* The super-packet whose segments are all proven and first in their flow passes as it came. The caller is the flow's owner. */
int pass_whole(struct __sk_buff *skb)
{
	u32 zero = 0, index = skb->cb[CB_FLOW], own = skb->cb[CB_OWN], ack = 0;
	u16 win = 0;
	struct flow *f = flows.lookup(&index);
	struct held_table *t = held.lookup(&zero);
	struct held first = {};
	struct place at;
	bool work = false;

	if (!f || !t || !place_of_id(&at, f->key.nic))
		return VERDICT_DROP;
#pragma nounroll
	for (int i = 0; i < MAX_SEGMENTS; i++) {
		u32 head = NONE;
		if (i >= own)
			break;
		bpf_spin_lock(&f->lock);
		head = f->p_head;
		if (head != NONE) {
			struct held *h = record(t, head);
			if (i == 0)
				first = *h;
			account_release(f, h, &ack, &win);
			if (at.state == PASSTHROUGH) { /* nobody else's numbers count any more */
				ack = h->ack;
				win = h->win;
			}
			at.count->compared_packets++;
			at.count->compared_bytes += h->len - h->payload;
			p_unlink_head(f, t);
		}
		bpf_spin_unlock(&f->lock);
		if (head == NONE)
			break;
		struct slot *slot = slab.lookup(&head);
		if (slot)
			note_timestamps(f, slot, &first);
		give_slot(head);
		at.count->unheld_packets++;
		at.count->released_packets++;
	}
	at.count->released_bytes += skb->len;
	at.count->released_unchanged++;
	int verdict = pass_original(skb, &at, &first, ack, win);
	bpf_spin_lock(&f->lock);
	if (f->work) {
		f->work = 0;
		work = true;
	} else {
		f->owner = 0;
	}
	bpf_spin_unlock(&f->lock);
	if (!work)
		return verdict == VERDICT_PASS ? to_client(skb, &at) : verdict;
	if (verdict == VERDICT_PASS) { /* more came in the meantime: this one goes first, as a clone, then serves as vessel */
		put_tag(skb, &at, index, f->generation, skb->cb[CB_MODE] & MODE_PARTIAL);
		skb->cb[CB_MODE] |= MODE_CLONE_FIRST;
		skb->cb[CB_OWN] = 0;
		skb->cb[CB_STAGED] = 0;
		tc_stages.call(skb, STAGE_DRAIN);
		skb->mark = 0;
		skb->tc_index = 0;
	}
	give_up(&at, f, index);
	return verdict == VERDICT_PASS ? to_client(skb, &at) : verdict;
}
