/* What user space runs through BPF_PROG_TEST_RUN: the flush after a commit, and the sweep. Both go over flows [cb[1], cb[2]) and leave in cb[1] where
 * to go on. They take the same locks as the hooks and keep the same rules. */

#define SWEEP_BATCH 128 /* flows a run looks at: what the verifier can follow */

/* Sends what a commit (or passthrough) released, flow by flow: finds the next flow that has something to do and drains it. */
int flush(struct __sk_buff *skb)
{
	u32 next = skb->cb[1], end = skb->cb[2], zero = 0;
	struct held_table *t = held.lookup(&zero);

	if (!t)
		return VERDICT_DROP;
#pragma nounroll
	for (int i = 0; i < SWEEP_BATCH; i++) {
		if (next >= end)
			break;
		u32 index = next++;
		struct flow *f = flows.lookup(&index);
		struct place at;
		bool drains = false;
		if (!f || !(f->flags & FLOW_LIVE) || !place_of_id(&at, f->key.nic) || at.nic->role != ROLE_PRIMARY)
			continue;
		bpf_spin_lock(&f->lock);
		bool late = behind(f, at.epoch) && at.state == LOCKSTEP;
		if ((f->flags & FLOW_LIVE) && (f->p_count || f->s_count || (f->flags & FLOW_DIVERGED) || late) &&
		    (late || f->work || at.state == PASSTHROUGH || (f->p_head != NONE && releasable(f, record(t, f->p_head))))) {
			if (f->owner) {
				f->work = 1;
			} else {
				f->owner = 1;
				drains = true;
			}
		}
		bpf_spin_unlock(&f->lock);
		if (drains) {
			skb->cb[CB_FLOW] = index;
			skb->cb[CB_MODE] = MODE_NO_REDIRECT;
			skb->cb[CB_OWN] = 0;
			skb->cb[CB_STAGED] = 0;
			skb->cb[CB_PARTIAL] = 0;
			u32 whose = SCRATCH_USER;
			struct scratch *notes = scratch.lookup(&whose);
			if (notes)
				notes->now = bpf_ktime_get_ns();
			skb->priority = next; /* cb is the drain's now */
			tc_stages.call(skb, STAGE_DRAIN);
			return VERDICT_DROP;
		}
	}
	skb->priority = next;
	return VERDICT_DROP;
}

/* Nobody runs the flush: the service is gone, and the pair goes on without protection (`on_service_loss = "open"`). What is held leaves with its flow's next
 * packet; for flows that say nothing more one walk a second goes over the table, in the vif's backlog, on clones of a frame that is sure to have no open
 * checksum: the peer's heartbeat, or the guest's ARP. */
int let_go(struct __sk_buff *skb)
{
	u32 next = skb->mark & FLOW_MASK, index = 0, zero = 0;
	u64 top = gauge(GAUGE_FLOW_TOP);
	bool drains = false;
	struct place at;

	if (!place_of_vif(&at, skb->ifindex) || at.state != PASSTHROUGH)
		return VERDICT_DROP;
#pragma nounroll
	for (int i = 0; i < SWEEP_BATCH; i++) {
		if (next >= top || drains)
			break;
		index = next++;
		struct flow *f = flows.lookup(&index);
		if (!f || !(f->flags & FLOW_LIVE) || !f->p_count || f->key.nic != at.nic->id)
			continue;
		bpf_spin_lock(&f->lock);
		if ((f->flags & FLOW_LIVE) && f->p_count) {
			if (f->owner) {
				f->work = 1;
			} else {
				f->owner = 1;
				drains = true;
			}
		}
		bpf_spin_unlock(&f->lock);
	}
	if (next < top)
		send_walk(skb, &at, next);
	struct flow *f = flows.lookup(&index);
	struct scratch *notes = scratch.lookup(&zero);
	if (drains && f && notes) {
		notes->now = bpf_ktime_get_ns();
		skb->cb[CB_FLOW] = index;
		skb->cb[CB_MODE] = 0;
		skb->cb[CB_OWN] = 0;
		skb->cb[CB_STAGED] = 0;
		skb->cb[CB_PARTIAL] = 0;
		tc_stages.call(skb, STAGE_DRAIN);
		give_up(&at, f, index);
	}
	return VERDICT_DROP;
}

/* A protection begins. Since the last one the PVM has sent what nobody looked at: the positions that the flow knows are of no use, and 2 GiB on they would
 * make new bytes look old. It begins anew with what comes next, and if nothing comes it goes like one half open: the connection may have ended meanwhile. */
static __always_inline void forget_stream(struct flow *f)
{
	bpf_spin_lock(&f->lock);
	if ((f->flags & FLOW_LIVE) && !f->owner && !f->p_count) {
		f->flags &= FLOW_LIVE | FLOW_NO_SACK;
		f->p_known = 0;
	}
	bpf_spin_unlock(&f->lock);
}

/* Likewise on the secondary: the numbers of an earlier protection are nobody's any more (learn_input(), learn_output() do the same with the next segment). */
static __always_inline void forget_numbers(struct flow *f, u32 epoch)
{
	bpf_spin_lock(&f->lock);
	if ((f->flags & FLOW_LIVE) && f->epoch != epoch)
		f->flags = FLOW_LIVE;
	bpf_spin_unlock(&f->lock);
}

/* A promoted SVM is about to become a PVM: the numbers that S2 and S3 give the connections which it opened are P1's and P2's from here on. For pair cb[3]. */
int keep_numbers(struct __sk_buff *skb)
{
	u32 next = skb->cb[1], end = skb->cb[2], pair = skb->cb[3];
	u64 now = bpf_ktime_get_ns();

#pragma nounroll
	for (int i = 0; i < SWEEP_BATCH; i++) {
		if (next >= end)
			break;
		u32 index = next++, epoch;
		struct flow *f = flows.lookup(&index);
		struct alias a = {};
		struct place at;
		if (!f || (f->flags & (FLOW_LIVE | FLOW_DELTA)) != (FLOW_LIVE | FLOW_DELTA) || !place_of_id(&at, f->key.nic) || at.nic->pair != pair)
			continue;
		u32 kept = kept_epoch(&at);
		bpf_spin_lock(&f->lock);
		a.seq_delta = f->seq_delta;
		a.ts_delta = f->ts_delta;
		a.guest_isn = f->svm_isn;
		a.guest_high = last_own(f);
		a.client_isn = f->client_isn;
		a.last_ns = f->last_ns;
		a.guest_fin = !!(f->flags & FLOW_FIN);
		a.client_fin = !!(f->flags & FLOW_CLIENT_FIN);
		a.reset = !!(f->flags & FLOW_RST);
		a.doubt = in_doubt(f, &at, kept);
		epoch = f->epoch;
		bool over = (s64)(now - f->last_ns) > (s64)idle_limit(f); /* nobody has swept it away yet */
		bpf_spin_unlock(&f->lock);
		if (!over && (epoch == at.epoch || a.doubt) && (a.seq_delta | a.ts_delta))
			aliases.update(&f->key, &a); /* in place of what an earlier connection on these ports may have left */
	}
	skb->priority = next;
	return VERDICT_DROP;
}

/* Looks for what waits too long, and ends idle flows. */
int sweep(struct __sk_buff *skb)
{
	u32 next = skb->cb[1], end = skb->cb[2], zero = 0;
	u64 now = bpf_ktime_get_ns();
	struct held_table *t = held.lookup(&zero);

	if (!t)
		return VERDICT_DROP;
#pragma nounroll
	for (int i = 0; i < SWEEP_BATCH; i++) {
		if (next >= end)
			break;
		u32 index = next++, kind = 0, reason = 0, offset = 0;
		u64 pvm = 0, svm = 0;
		struct flow *f = flows.lookup(&index);
		struct place at;
		if (!f || !(f->flags & FLOW_LIVE) || !place_of_id(&at, f->key.nic))
			continue;
		if (at.state == SYNCING && at.nic->role == ROLE_PRIMARY)
			forget_stream(f);
		else if (at.state == SYNCING)
			forget_numbers(f, at.epoch);
		if (!f->p_count && !f->s_count) {
			reclaim(index, now);
			continue;
		}
		s64 patience = compare_timeout(&at);
		bpf_spin_lock(&f->lock);
		struct held *p = record(t, f->p_head), *s = record(t, f->s_head);
		bool p_late = f->p_head != NONE && (s64)(now - p->since_ns) > patience;
		bool s_late = f->s_head != NONE && (s64)(now - s->since_ns) > patience;
		if (p_late && releasable(f, p) && !f->owner && f->epoch == at.epoch && may_pass(f, now)) {
			kind = EVENT_KICK; /* its wake-up was lost with a packet that the stack dropped */
		} else if ((p_late || s_late) && !(f->flags & (FLOW_LATE | FLOW_DIVERGED))) {
			f->flags |= FLOW_LATE;
			kind = EVENT_TIMEOUT;
			reason = s_late ? REASON_MISSING_PVM : REASON_MISSING_SVM;
			if (p_late) {
				offset = p->from;
				pvm = p->digest;
			}
			if (s_late)
				svm = s->digest;
			if (p_late && s_late && f->key.kind != KIND_TCP) { /* both had their time: they are different datagrams */
				f->flags |= FLOW_DIVERGED;
				kind = EVENT_DIVERGENCE;
				reason = REASON_DATAGRAM;
				offset = p->end;
			}
		}
		bpf_spin_unlock(&f->lock);
		if (!kind)
			continue;
		if (kind == EVENT_DIVERGENCE || kind == EVENT_TIMEOUT)
			at.count->divergences[reason & 15]++;
		if (kind == EVENT_TIMEOUT)
			at.count->timeouts++;
		if (kind == EVENT_KICK)
			at.count->kicks++;
		tell(&at, kind, reason, index, &f->key, offset, pvm, svm);
	}
	skb->priority = next;
	return VERDICT_DROP;
}
