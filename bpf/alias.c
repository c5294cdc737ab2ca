/* P1 and P2 where the pair has connections that the client knows by other numbers (bpf/alias.h): what P1 does first, and what P2 does last. */

/* The guest's numbers for what comes in, the client's for what goes out; VERDICT_DROP if the frame can't have them. */
static __always_inline int renumber(struct __sk_buff *skb, struct place *at, bool input)
{
	struct deltas d = {};
	struct view v = look(skb);
	struct scratch *notes = fresh_scratch(at);
	if (!notes)
		return VERDICT_DROP;
	struct packet *p = &notes->packet;
	parse(&v, p, skb->len, input);
	if (p->key.kind != KIND_TCP)
		return VERDICT_PASS;
	tag_beside(skb, p);
	u64 now = bpf_ktime_get_coarse_ns();
	if (!(input ? alias_input(p, at, now, &d) : alias_output(p, at, now, &d)))
		return VERDICT_PASS;
	if (input)
		edit_input(&notes->edits, &v, p, d.seq, d.ts);
	else
		edit_output(&notes->edits, &v, p, d.seq, d.ts);
	if (apply(skb, &notes->edits, p, at))
		return VERDICT_PASS;
	drop(at, DROP_EMIT);
	return VERDICT_DROP;
}

/* Tail-called by P1: the frame gets the guest's numbers, then it is noted, copied and delivered. */
int p1_alias(struct __sk_buff *skb)
{
	struct place at;

	if (!place_of_vif(&at, skb->ifindex))
		return VERDICT_PASS;
	int verdict = renumber(skb, &at, true);
	return verdict == VERDICT_PASS ? mirror(skb, &at) : verdict;
}

/* Tail-called by P2 with whatever leaves for the client, compared or not: it gets the client's numbers. */
int p2_alias(struct __sk_buff *skb)
{
	struct place at;

	return place_of_vif(&at, skb->ifindex) ? renumber(skb, &at, false) : VERDICT_PASS;
}
