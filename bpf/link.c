/* The forward link, on either host: finds out which guest NIC a frame belongs to, before P3 or S1 (XDP) and P4 or S1's delivery (tc). */

/* XDP on fwd. A shared device has a VLAN tag per NIC, which comes off here; on a dedicated one (VLAN 0) every frame is the NIC's, tags and all. */
int link_arrive(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct link_key key = {.fwd = ctx->ingress_ifindex};
	u32 zero = 0, *id = links.lookup(&key);
	u8 *eth = data;

	if (!id) {
		if (data + 18 > end || (*(u16 *)(eth + 12) != bpf_htons(ETH_P_8021Q_)))
			goto unknown;
		key.vlan = be16_at(eth + 14) & 0xfff;
		id = links.lookup(&key);
		if (!id)
			goto unknown;
		u64 macs = *(u64 *)eth; /* moves the addresses up over the tag */
		u32 rest = *(u32 *)(eth + 8);
		*(u64 *)(eth + 4) = macs;
		*(u32 *)(eth + 12) = rest;
		if (bpf_xdp_adjust_head(ctx, 4))
			return XDP_DROP;
	}
	struct place at;
	if (!place_of_id(&at, *id))
		return XDP_DROP;
	if (bpf_xdp_adjust_meta(ctx, -(int)sizeof(struct arrival))) {
		drop(&at, DROP_NO_METADATA);
		return XDP_DROP;
	}
	data = (void *)(long)ctx->data;
	struct arrival *a = (void *)(long)ctx->data_meta;
	if ((void *)(a + 1) > data)
		return XDP_DROP;
	__builtin_memset(a, 0, sizeof(*a));
	a->nic = at.nic->id;
	xdp_stages.call(ctx, at.nic->role == ROLE_PRIMARY ? STAGE_P3 : STAGE_S1_XDP);
	return XDP_DROP;
unknown:;
	/* Nobody's: counted in the last place, which NIC 63 shares. */
	u32 none = MAX_NICS - 1;
	struct counters *count = counters.lookup(&none);
	if (count)
		count->dropped[DROP_UNKNOWN_LINK]++;
	return XDP_DROP;
}

/* tc ingress of fwd. Nothing that comes in here ever reaches the host's own stack. */
int link_deliver(struct __sk_buff *skb)
{
	struct arrival *a = (void *)(long)skb->data_meta;

	if ((void *)(a + 1) > (void *)(long)skb->data)
		return VERDICT_DROP;
	tc_stages.call(skb, a->type ? STAGE_P4 : STAGE_S1); /* only P3 says what type of record it is */
	return VERDICT_DROP;
}
