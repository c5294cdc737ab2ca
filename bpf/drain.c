/* Matching and releasing: the one program that sends what was held. P2, P4, a released packet that comes back and the flush tail-call it after they
 * made themselves the flow's owner (bpf/flow.h). It works in steps and tail-calls itself when they don't suffice. */

#define CB_FLOW 0   /* in skb->cb: flow number */
#define CB_MODE 1   /* MODE_* */
#define CB_OWN 2    /* P2: records that its super-packet was split into, the last ones of the list; 0: none */
#define CB_STAGED 3 /* 1: the vessel carries a packet that has not been sent */
#define CB_GENERATION CB_MODE /* split: the flow's generation */
#define CB_SEGMENT CB_STAGED  /* split: the number of the next segment */
#define CB_READY CB_OWN       /* P4: come again with a slot */
#define CB_PARTIAL 4 /* offset of the TCP or UDP header of a CHECKSUM_PARTIAL vessel */

#define LAST 8u    /* added to a step's verdict: nothing is left to do */
#define BLOCKED 5u /* a step's verdict: this vessel can't carry what is first */

/* A vessel with an open checksum carries only what has its transport header at the same place. */
static __always_inline bool misfit(u32 mode, u32 l4, const struct held *h) { return (mode & MODE_PARTIAL) && h->l4 != l4; }

/* The kernel's 33 tail calls were not enough. What was sent comes back through the vif and goes on (come_back()); if nothing was, user space runs
 * `flush`, and the next packet of the flow goes on too. By the flow's owner. */
static __always_inline void give_up(const struct place *at, struct flow *f, u32 index)
{
	bpf_spin_lock(&f->lock);
	f->owner = 0;
	f->work = 1;
	bool alone = !f->in_flight;
	bpf_spin_unlock(&f->lock);
	if (alone) {
		at->count->kicks++;
		tell(at, EVENT_KICK, 0, index, &f->key, 0, 0, 0);
	}
}

int drain(struct __sk_buff *skb)
{
	u32 zero = 0, index = skb->cb[CB_FLOW], mode = skb->cb[CB_MODE], own = skb->cb[CB_OWN], staged = skb->cb[CB_STAGED];
	u32 cpu = bpf_get_smp_processor_id() | (mode & MODE_NO_REDIRECT) << 16; /* user space's is a CPU of its own, see SCRATCH_USER */
	struct flow *f = flows.lookup(&index);
	struct held_table *t = held.lookup(&zero);
	struct hash_keys *keys = hash_keys.lookup(&zero);
	struct place at;
	u32 matching = !(mode & MODE_RELEASE), first = mode & MODE_RELEASE;
	bool more = true;

	if (!f || !t || !keys || !place_of_id(&at, f->key.nic))
		return VERDICT_DROP; /* never: P2 and P4 have just looked them up */
	u32 id = at.nic->id, vif = at.nic->vif;
	struct histogram *waited = holding.lookup(&id);
	u32 whose = mode & MODE_NO_REDIRECT ? SCRATCH_USER : SCRATCH_HOOK;
	struct scratch *notes = scratch.lookup(&whose);
	if (!waited || !notes)
		return VERDICT_DROP;
	u64 now = notes->now;
	u32 beside = forget(notes, 0, !(mode & MODE_PARTIAL) || !f->key.vlan[0] ? 0 : f->key.vlan[1] ? BESIDE_KEPT : BESIDE);

	if (mode & MODE_CLONE_FIRST) {
		bpf_spin_lock(&f->lock);
		note_emit(f, cpu, now);
		bpf_spin_unlock(&f->lock);
		if (bpf_clone_redirect(skb, vif, BPF_F_INGRESS))
			drop(&at, DROP_EMIT);
		mode &= ~MODE_CLONE_FIRST;
	}
	if (at.state == LOCKSTEP && behind(f, at.epoch)) {
		bpf_spin_lock(&f->lock);
		rebase(f, at.epoch);
		bpf_spin_unlock(&f->lock);
	}

#pragma nounroll
	for (int i = 0; i < DRAIN_STEPS; i++) {
		u32 used = NONE, out = NONE, ack = 0, spare = NONE;
		u16 win = 0;

		matching = forget(notes, 4, matching); /* one state at the top of each step, whatever the last one did */
		staged = forget(notes, 5, staged);
		own = forget(notes, 6, own);
		first = forget(notes, 5, first);
		if (matching) {
			struct finding found = {};
			u32 s = f->s_head;
			if (s != NONE && at.state == LOCKSTEP && record(t, s)->epoch != f->epoch) {
				used = s; /* the old SVM's */
			} else if (f->key.kind != KIND_TCP || at.state != LOCKSTEP || match_stream(f, t, notes, keys, &found, &used) == STEP_WAIT) {
				matching = 0;
			}
			used = forget(notes, 0, used);
			if (used != NONE) {
				u32 gone = 0;
				bpf_spin_lock(&f->lock);
				if (f->s_head == used) { /* else P4 has just put one before it: being used up, it goes when its turn comes again */
					s_unlink_head(f, t);
					gone = 1;
				}
				bpf_spin_unlock(&f->lock);
				if (gone) {
					at.count->svm_unparked++;
					give_slot_of(whose, used);
				}
			}
			if (found.any) {
				at.count->divergences[found.reason & 15]++;
				tell(&at, EVENT_DIVERGENCE, found.reason, index, &f->key, found.offset, found.pvm, found.svm);
			}
			if (matching)
				continue;
		}

		bool owed = !(mode & MODE_PARTIAL) && f->key.kind == KIND_TCP && (f->flags & FLOW_BASED) && owes_ack(f) && at.state == LOCKSTEP;
		if (owed)
			spare = take_slot_of(&at, whose);
		u32 seq = 0, ts_known = 0, verdict = 0, seen = 0;
		struct held *h;
		bpf_spin_lock(&f->lock);
		u32 head = f->p_head;
		if (at.state == HALTED) {
			verdict = 0;
		} else if (own && f->p_count == own && f->p_proven == own && may_pass(f, now)) {
			verdict = 3; /* the whole super-packet is proven and first: it passes as it came */
		} else if (head != NONE && (at.state == PASSTHROUGH || releasable(f, record(t, head))) && may_emit(f, cpu, now) &&
			   misfit(mode, skb->cb[CB_PARTIAL], record(t, head))) {
			verdict = BLOCKED; /* the kernel would write a checksum into the wrong bytes: another vessel has to come */
			f->owner = 0;
			f->work = 1;
		} else if (head != NONE && (at.state == PASSTHROUGH || releasable(f, record(t, head))) && may_emit(f, cpu, now)) {
			h = record(t, head);
			account_release(f, h, &ack, &win);
			if (h->sack)
				__builtin_memcpy(notes->sack, f->s_sack, sizeof(notes->sack));
			if (at.state == PASSTHROUGH) { /* nobody else's numbers count any more */
				ack = h->ack;
				win = h->win;
			}
			p_unlink_head(f, t);
			out = head;
			verdict = 1;
		} else if (spare != NONE && !(mode & MODE_PARTIAL) && owes_ack(f) && may_emit(f, cpu, now)) {
			ack = seq_lt(f->s_ack, f->p_seen) ? f->s_ack : f->p_seen;
			win = f->s_win < f->p_win ? f->s_win : f->p_win;
			if (seq_lt(f->c_ack, ack))
				f->c_ack = ack;
			ack = f->c_ack;
			f->c_win = win;
			f->flags &= ~FLOW_DUP;
			seq = f->proven;
			seen = f->flags & FLOW_NO_SACK ? ack : f->p_seen;
			__builtin_memcpy(notes->sack, f->s_sack, sizeof(notes->sack));
			ts_known = f->ts_known;
			verdict = 2;
		}
		if (verdict == 1 || verdict == 2) {
			note_emit(f, cpu, now);
			/* The last one: the flow needs no owner any more. Until this packet is back, only this CPU may send the next (may_emit()). */
			if (!f->work && f->p_head == NONE && !(matching | first) && !owes_ack(f)) {
				f->owner = 0;
				verdict += LAST;
			}
		} else if (verdict == 0 && (f->work | first)) {
			f->work = 0;
			verdict = 4;
		} else if (verdict == 0) {
			f->owner = 0;
		}
		bpf_spin_unlock(&f->lock);

		verdict = forget(notes, 7, verdict);
		out = forget(notes, 0, verdict == LAST + 2 || verdict == 2 ? spare : out);
		seq = forget(notes, 1, seq);
		ack = forget(notes, 2, ack);
		win = forget(notes, 3, win);
		bool last = verdict >= LAST;
		verdict &= LAST - 1;
		if (spare != NONE && verdict != 2)
			give_slot_of(whose, spare);
		if (verdict == BLOCKED) {
			at.count->kicks++;
			tell(&at, EVENT_KICK, 0, index, &f->key, 0, 0, 0);
		}
		if (verdict == 0 || verdict == BLOCKED) {
			more = false;
			break;
		}
		if (verdict == 4) {
			matching = 1;
			first = 0;
			continue;
		}
		if (verdict == 3) {
			skb->cb[CB_FLOW] = index;
			tc_stages.call(skb, STAGE_PASS);
			give_up(&at, f, index);
			return VERDICT_DROP;
		}
		struct slot *slot = slab.lookup(&out);
		h = record(t, out);
		if (!slot)
			return VERDICT_DROP;
		if (verdict == 2) {
			at.count->owed_acks++;
			struct ack_fields is = {.seq = seq, .ack = ack, .ts_val = f->ts_val, .ts_ecr = f->s_ecr ? f->s_ecr : f->ts_ecr, .win = win, .flags = TCP_ACK, .stamped = ts_known};
			build_ack(slot, h, &f->key, f->guest_mac, &is, notes, common_blocks(notes, ack, seen));
			h->hash = f->hash;
		} else {
			if ((h->flags & HELD_ACKS) && (h->ack != ack || h->win != win)) {
				lower(slot, h, ack, win);
				at.count->lowered++;
			}
			if (h->sack && at.state != PASSTHROUGH && blank_sack(slot, h, notes, &f->key, f->s_ack))
				at.count->lowered++;
			if (f->key.kind == KIND_TCP)
				note_timestamps(f, slot, h);
			count_release(&at, waited, h, now);
			if (h->epoch != f->epoch || at.state == PASSTHROUGH) {
				matching = 1; /* it moved the stream on */
				at.count->committed_packets++;
			} else {
				at.count->compared_packets++;
				at.count->compared_bytes += h->len - h->payload;
			}
		}
		if (mode & MODE_PARTIAL) { /* the kernel will add the rest */
			u32 o = h->l4 + (f->key.proto == IPPROTO_TCP ? 16 : 6);
			BOUND(o, SLOT_BYTES - 1);
			if (h->l4 >= 34)
				*(u16 *)(slot->byte + o) = fold(pseudo_sum(&f->key, h->len - h->l4));
		}
		if (staged && bpf_clone_redirect(skb, vif, BPF_F_INGRESS))
			drop(&at, DROP_EMIT);
		staged = load_vessel(skb, &at, slot, h, index, f->generation, beside);
		if (mode & MODE_PARTIAL)
			skb->tc_index |= TAG_OPEN_SUM;
		own = 0; /* it is no longer the packet it came as */
		if (!staged)
			drop(&at, DROP_EMIT);
		give_slot_of(whose, out);
		if (staged && (mode & MODE_NO_REDIRECT)) {
			if (bpf_clone_redirect(skb, vif, BPF_F_INGRESS))
				drop(&at, DROP_EMIT);
			staged = 0;
		}
		if (last) {
			more = false;
			break;
		}
	}

	if (more) {
		/* A long list: what is proven goes in between, so that at the end something is in flight, which comes back and goes on. */
		skb->cb[CB_MODE] = own ? mode : mode ^ MODE_RELEASE;
		skb->cb[CB_OWN] = own;
		skb->cb[CB_STAGED] = staged;
		tc_stages.call(skb, STAGE_DRAIN);
		give_up(&at, f, index);
	}
	return staged ? bpf_redirect(vif, BPF_F_INGRESS) : VERDICT_DROP;
}
