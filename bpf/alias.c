/* P1 and P2 where the pair has connections that the client knows by other numbers (bpf/alias.h): what P1 does first, and what P2 does last. */

/* Tail-called by P1: the frame gets the guest's numbers, then it is noted, copied and delivered. */
int p1_alias(struct __sk_buff *skb)
{
	struct deltas d = {};
	struct place at;

	if (!place_of_vif(&at, skb->ifindex))
		return VERDICT_PASS;
	struct view v = look(skb);
	struct scratch *notes = fresh_scratch(&at);
	if (!notes)
		return VERDICT_DROP;
	struct packet *p = &notes->packet;
	parse(&v, p, skb->len, true);
	if (p->key.kind == KIND_TCP) {
		tag_beside(skb, p);
		if (alias_input(p, &at, bpf_ktime_get_coarse_ns(), &d)) {
			edit_input(&notes->edits, &v, p, d.seq, d.ts);
			if (!apply(skb, &notes->edits, p, &at)) {
				drop(&at, DROP_EMIT);
				return VERDICT_DROP;
			}
		}
	}
	return mirror(skb, &at);
}

/* Tail-called by P2 with whatever leaves for the client, compared or not: it gets the client's numbers. */
int p2_alias(struct __sk_buff *skb)
{
	struct deltas d = {};
	struct place at;

	if (!place_of_vif(&at, skb->ifindex))
		return VERDICT_PASS;
	struct view v = look(skb);
	struct scratch *notes = fresh_scratch(&at);
	if (!notes)
		return VERDICT_DROP;
	struct packet *p = &notes->packet;
	parse(&v, p, skb->len, false);
	if (p->key.kind != KIND_TCP)
		return VERDICT_PASS;
	tag_beside(skb, p);
	if (!alias_output(p, &at, bpf_ktime_get_coarse_ns(), &d))
		return VERDICT_PASS;
	edit_output(&notes->edits, &v, p, d.seq, d.ts);
	if (apply(skb, &notes->edits, p, &at))
		return VERDICT_PASS;
	drop(&at, DROP_EMIT);
	return VERDICT_DROP;
}
