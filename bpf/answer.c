/* What the SVM is told in the client's name, when the forward link has lost something: nobody else would tell it.
 *
 * - A frame of the client's was lost on its way to the SVM. The client and the PVM are done with it, so it never comes again; the SVM repeats what it
 *   has not heard acknowledged, or its probe of a shut window, or its SYN-ACK. It gets the client's last ACK (or reset) again, as P1 has noted it.
 * - A frame of the SVM's was lost on its way here. What follows it is parked behind the hole, the client gets nothing of it and so can't complain. The
 *   SVM gets what a receiver would say: a duplicate of the client's ACK, with SACK blocks of what is parked (RFC 2018). The acknowledged number is
 *   never above the client's: the SVM must keep all that the client may still lose. SACK blocks may be told because they can be taken back.
 *
 * One answer at most for a packet of the SVM's that carries data or begins below the client's ACK, so no ACK is ever answered with an ACK. */

/* After P4, on its behalf: what it wanted to do with the flow. */
static __always_inline int p4_goes_on(struct __sk_buff *skb, u32 take)
{
	if (take == TAKE_PARTIAL)
		tc_stages.call(skb, STAGE_PARTIAL);
	if (take == TAKE_DRAIN) {
		asm volatile("" : "+r"(skb)); /* or clang keeps the address of cb[], which the verifier refuses */
		skb->cb[CB_MODE] = 0;
		skb->cb[CB_OWN] = 0;
		skb->cb[CB_STAGED] = 0;
		skb->cb[CB_PARTIAL] = 0;
		tc_stages.call(skb, STAGE_DRAIN);
	}
	return VERDICT_DROP;
}

/* [from, end) was parked, in record `tail`. Is there a hole before it? Then it joins the pieces behind the hole, the newest first: the oldest is forgotten
 * if there are too many. Else those that it reaches are behind the hole no more. */
static __always_inline bool note_run(struct flow *f, u32 from, u32 end, u32 tail)
{
	u32 next = seq_lt(f->s_next, f->matched) ? f->matched : f->s_next, any = 0;
	bool hole = seq_lt(next, from), had = f->flags & FLOW_RUNS;

	if (!hole)
		from = next;
	if (!hole && seq_lt(end, next)) {
		end = next;
		tail = f->s_next_tail;
	}
#pragma unroll
	for (int i = 0; i < 2 * RUNS; i++) { /* twice: what was passed by may touch what came in later */
		struct run *r = &f->s_run[i % RUNS];
		if (i < RUNS && (!had || !seq_lt(next, r->end)))
			r->from = r->end = 0;
		if (r->from == r->end || seq_lt(end, r->from) || seq_lt(r->end, from))
			continue;
		if (seq_lt(r->from, from))
			from = r->from;
		if (seq_lt(end, r->end)) {
			end = r->end;
			tail = r->tail;
		}
		r->from = r->end = 0;
	}
	if (hole) {
		struct run in = {.from = from, .end = end, .tail = tail};
#pragma unroll
		for (int i = 0; i < RUNS; i++) {
			struct run out = f->s_run[i];
			f->s_run[i] = in;
			in = out;
			if (out.from == out.end)
				break;
		}
		f->flags |= FLOW_RUNS;
		return true;
	}
#pragma unroll
	for (int i = 0; i < RUNS; i++)
		any |= f->s_run[i].from ^ f->s_run[i].end;
	if (!any)
		f->flags &= ~FLOW_RUNS;
	f->s_next = end;
	f->s_next_tail = tail;
	return false;
}

/* Tail-called by P4, with what the packet needs in `notes->answer` and P4's own verdict in CB_MODE. */
int answer(struct __sk_buff *skb)
{
	u32 zero = 0, index = skb->cb[CB_FLOW], take = skb->cb[CB_MODE], fill = 0, blocks = 0, i;
	struct flow *f = flows.lookup(&index);
	struct scratch *notes = scratch.lookup(&zero);
	struct ack_fields is = {};
	struct place at;
	u8 macs[12];

	if (!f || !notes || !place_of_id(&at, f->key.nic))
		return VERDICT_DROP; /* never: P4 has just looked them up */
	u32 what = notes->answer.what, from = notes->answer.from, end = notes->answer.end;
	is.seq = notes->answer.seq;
	is.flags = TCP_ACK;
	bpf_spin_lock(&f->lock);
	if ((what & ANSWER_RUN) && f->epoch == at.epoch && f->s_era == notes->answer.era) { /* else the record may be another one's by now */
		if (note_run(f, from, end, notes->answer.record))
			what |= ANSWER_ACK;
	}
	what &= ~ANSWER_RUN;
	if (what & ANSWER_RST) {
		is.seq = f->client_rst;
		is.flags = TCP_RST;
	} else if (!(f->flags & FLOW_CLIENT)) {
		what = 0;
	} else {
		u32 next = seq_lt(f->s_next, f->matched) ? f->matched : f->s_next;
		is.ack = what & ANSWER_SYN ? f->pvm_isn + 1 : f->client_ack;
		is.win = f->client_win;
		is.stamped = f->flags & FLOW_CLIENT_TS;
		is.ts_val = f->client_ts_val;
		is.ts_ecr = what & ANSWER_OLD && notes->answer.ts_val ? notes->answer.ts_val : f->client_ts_ecr; /* RFC 7323, 4.3 */
		if ((f->flags & (FLOW_RUNS | FLOW_NO_SACK)) == FLOW_RUNS) {
#pragma unroll
			for (i = 0; i < RUNS; i++) {
				u32 left = f->s_run[i].from, right = f->s_run[i].end;
				if (fill >= ACK_BLOCKS || left == right || !seq_lt(next, left) || !seq_lt(f->client_ack, left))
					continue;
				BOUND(fill, 3);
				notes->sack[2 * fill] = left;
				notes->sack[2 * fill + 1] = right;
				fill++;
			}
			blocks = fill;
		}
	}
	bpf_spin_unlock(&f->lock);
	what = forget(notes, 3, what);
	blocks = forget(notes, 4, blocks);
	u32 slot_index = what ? take_slot(&at) : NONE;
	struct slot *slot = slab.lookup(&slot_index);
	if (slot) {
		struct held *h = &notes->held;
		__builtin_memcpy(macs, f->remote_mac, 6);
		__builtin_memcpy(macs + 6, f->guest_mac, 6);
		build_ack(slot, h, &f->key, macs, &is, notes, blocks);
		/* From the client to the guest: the sums don't mind which address and port comes first. */
		u32 off = h->l4;
		bool ip4 = f->key.guest[2] == bpf_htonl(0xffff) && !f->key.guest[0] && !f->key.guest[1];
		u32 ends = forget(notes, 5, off - (ip4 ? 8 : 32));
		off = forget(notes, 6, off);
		BOUND(off, 0x7f);
		BOUND(ends, 0x7f);
		*(u16 *)(slot->byte + off) = f->key.remote_port;
		*(u16 *)(slot->byte + off + 2) = f->key.guest_port;
		u32 *ip = (u32 *)(slot->byte + ends);
		if (ip4) {
			ip[0] = f->key.remote[3];
			ip[1] = f->key.guest[3];
		} else {
#pragma unroll
			for (int j = 0; j < 4; j++) {
				ip[j] = f->key.remote[j];
				ip[4 + j] = f->key.guest[j];
			}
		}
		h->hash = skb->hash;
		bool loaded = load_vessel(skb, &at, slot, h, index, f->generation, 0);
		skb->mark = 0;
		skb->tc_index = 0;
		give_slot(slot_index);
		if (loaded && at.nic->vlan)
			loaded = !bpf_skb_vlan_push(skb, bpf_htons(ETH_P_8021Q_), at.nic->vlan);
		if (loaded && !bpf_clone_redirect(skb, at.nic->fwd, 0))
			at.count->answers++;
		else
			drop(&at, DROP_EMIT);
	}
	skb->cb[CB_FLOW] = index;
	return p4_goes_on(skb, take);
}
