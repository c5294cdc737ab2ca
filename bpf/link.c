/* The forward link, on either host: finds out which guest NIC a frame belongs to, before P3 or S1 (XDP) and P4 or S1's delivery (tc). */

/* A heartbeat of the other host's service: noted for ours, and nobody else's. False: it is none. */
static __always_inline bool note_beat(const struct xdp_md *ctx, u32 id)
{
	u8 *eth = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	struct fwd_beat *beat = fwd_beats.lookup(&id);

	if (!beat || (void *)eth + 14 + 5 + 16 + 8 > end || be16_at(eth + 12) != ETH_P_BEAT || be32_at(eth + 14) != BEAT_MAGIC || eth[18] != BEAT_VERSION)
		return false;
	const u64 *cookie = (void *)(eth + 19);
	if ((cookie[0] ^ beat->expect[0]) | (cookie[1] ^ beat->expect[1]) || !(beat->expect[0] | beat->expect[1])) {
		beat->strangers++;
		return true;
	}
	beat->cookie[0] = cookie[0];
	beat->cookie[1] = cookie[1];
	beat->counter = (u64)be32_at(eth + 35) << 32 | be32_at(eth + 39);
	beat->last_ns = bpf_ktime_get_ns();
	return true;
}

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
	bool beat = note_beat(ctx, at.nic->id);
	if (beat && !walk_due(&at))
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
	if (beat) {
		a->type = ARRIVAL_BEAT;
		return XDP_PASS;
	}
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
	if (a->type == ARRIVAL_BEAT) {
		struct place at;
		if (place_of_id(&at, a->nic))
			send_walk(skb, &at, 0);
		return VERDICT_DROP;
	}
	skb->cb[CB_READY] = 0;
	tc_stages.call(skb, !a->type ? STAGE_S1 : a->type <= HELD_ACK ? STAGE_P4 : STAGE_P4_DATAGRAM); /* only P3 says what type of record it is */
	return VERDICT_DROP;
}
