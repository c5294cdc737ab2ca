/* The secondary's hooks: S1, S2, S3 of docs/design.md. */

/* S1, XDP on fwd behind bpf/link.c: a client frame arrives, its TCP numbers become the SVM's. */
int s1_arrive(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct arrival *a = (void *)(long)ctx->data_meta;
	struct view v = {.data = data, .end = end};
	struct place at;
	u64 sum = 0;

	if ((void *)(a + 1) > data || !place_of_id(&at, a->nic))
		return XDP_DROP;
	if (at.state != LOCKSTEP && at.state != CHECKPOINTING && at.state != SYNCING) {
		drop(&at, DROP_STATE); /* promoted: the bridge serves the SVM now */
		return XDP_DROP;
	}
	u8 *eth = peek(&v, 0, 14);
	if (!eth) {
		drop(&at, DROP_SHORT);
		return XDP_DROP;
	}
	struct scratch *notes = fresh_scratch(&at);
	if (!notes)
		return XDP_DROP;
	struct packet *p = &notes->packet;
	struct edits *e = &notes->edits;
	parse(&v, p, end - data, true);
	at.count->delivered++;
	a->from = at.epoch; /* whose numbers the frame has, and so which SVM gets it */
	if (p->key.kind != KIND_TCP)
		return XDP_PASS;
	u64 time = bpf_ktime_get_ns();
	alias_watch(p, &at, time);
	if (on_trial(&at)) /* the new SVM is a copy: the numbers stay, and what is known of the old one's is kept */
		return XDP_PASS;
	if (!from_client(e, &v, p, &at, time, false)) {
		drop(&at, DROP_EARLY_ACK);
		return XDP_DROP;
	}
	if (!e->count)
		return XDP_PASS;
	at.count->translated++;
	u16 *check = peek(&v, p->l4_check, 2);
	if (!check)
		return XDP_DROP;
	u16 now = *check;
#pragma unroll
	for (int i = 0; i < 10; i++) {
		if (i >= e->count)
			continue;
		u32 off = e->at[i].off, old = e->at[i].old, new = e->at[i].new;
		u32 *field = peek(&v, off, 4);
		if (!field)
			return XDP_DROP;
		*field = new;
		if ((off - p->l4) & 1) { /* at an odd offset the sum's bytes are swapped (RFC 1071) */
			old = old << 8 | old >> 24;
			new = new << 8 | new >> 24;
		}
		now = sum_replace(now, old, new);
	}
	*check = now;
	return XDP_PASS;
}

/* S1's second half, tc ingress of fwd: into the vif, with the mark that S3 lets pass. (vifs have no XDP to redirect to.) */
int s1_deliver(struct __sk_buff *skb)
{
	struct arrival *a = (void *)(long)skb->data_meta;
	struct place at;

	if ((void *)(a + 1) > (void *)(long)skb->data || !place_of_id(&at, a->nic))
		return VERDICT_DROP;
	skb->mark = at.set->mark;
	return bpf_redirect(vif_in(at.nic, a->from), 0);
}

/* S2, tc ingress of the vif: the SVM's output. */
int s2_output(struct __sk_buff *skb)
{
	struct place at;

	if (!place_of_vif(&at, skb->ifindex))
		return VERDICT_PASS;
	if (at.state == HALTED || at.state == UNPROTECTED || at.state == PASSTHROUGH) {
		drop(&at, at.state == HALTED ? DROP_HALTED : DROP_ISOLATED);
		return VERDICT_DROP;
	}
	if (vif_in(at.nic, at.epoch) != skb->ifindex) { /* a VM that is no SVM any more, or not yet */
		drop(&at, DROP_ISOLATED);
		return VERDICT_DROP;
	}
	struct view v = look(skb);
	struct scratch *notes = fresh_scratch(&at);
	if (!notes)
		return VERDICT_DROP;
	struct packet *p = &notes->packet;
	struct edits *e = &notes->edits;
	parse(&v, p, skb->len, false);
	tag_beside(skb, p);
	if (p->key.kind == KIND_TCP) {
		from_svm(e, &v, p, &at, bpf_ktime_get_ns());
		if (!apply(skb, e, p, &at)) {
			drop(&at, DROP_EMIT);
			return VERDICT_DROP;
		}
	}
	at.count->svm_output++;
	if (at.state == PROMOTED)
		return VERDICT_PASS;
	if (at.nic->vlan && bpf_skb_vlan_push(skb, bpf_htons(ETH_P_8021Q_), at.nic->vlan)) {
		drop(&at, DROP_EMIT);
		return VERDICT_DROP;
	}
	return bpf_redirect(at.nic->fwd, 0);
}

/* S3, tc egress of the vif: what the bridge has for the SVM. Until it is promoted it hears only S1. */
int s3_isolate(struct __sk_buff *skb)
{
	struct place at;

	if (!place_of_vif(&at, skb->ifindex))
		return VERDICT_PASS;
	if (is_ours(&at, skb->mark))
		return VERDICT_PASS;
	if (at.state != PROMOTED || vif_in(at.nic, at.epoch) != skb->ifindex) {
		drop(&at, DROP_ISOLATED);
		return VERDICT_DROP;
	}
	struct view v = look(skb);
	struct scratch *notes = fresh_scratch(&at);
	if (!notes)
		return VERDICT_DROP;
	struct packet *p = &notes->packet;
	struct edits *e = &notes->edits;
	parse(&v, p, skb->len, true);
	tag_beside(skb, p);
	if (p->key.kind != KIND_TCP)
		return VERDICT_PASS;
	if (!from_client(e, &v, p, &at, bpf_ktime_get_ns(), true)) {
		drop(&at, DROP_EARLY_ACK);
		return VERDICT_DROP;
	}
	if (!apply(skb, e, p, &at)) {
		drop(&at, DROP_EMIT);
		return VERDICT_DROP;
	}
	return VERDICT_PASS;
}
