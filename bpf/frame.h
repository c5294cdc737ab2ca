/* The address of a frame: pair, NIC, state, counters. And what every hook does with them. */

struct place {
	struct nic *nic;
	struct settings *set;
	struct counters *count;
	u32 state; /* enum pair_state, as the deadline leaves it */
	u32 epoch;
	u32 aliased; /* see struct pair */
};

static __always_inline void gauge_add(u32 which, s64 n)
{
	u64 *g = gauges.lookup(&which);
	if (g)
		__sync_fetch_and_add(g, n);
}

static __always_inline u64 gauge(u32 which)
{
	u64 *g = gauges.lookup(&which);
	return g ? *(volatile u64 *)g : 0;
}

/* State and counters of `nic`; false if the maps have no such place. The state and the epoch are one load of 8 bytes. */
static __always_inline bool place_of(struct place *at, struct nic *nic)
{
	u32 zero = 0;
	if (!nic || nic->id >= MAX_NICS)
		return false;
	struct pair *pair = pairs.lookup(&nic->pair);
	at->nic = nic;
	at->set = settings.lookup(&zero);
	at->count = counters.lookup(&nic->id);
	if (!pair || !at->set || !at->count)
		return false;
	u64 word = *(volatile u64 *)pair, deadline = *(volatile u64 *)&pair->deadline_ns;
	at->state = (u32)word;
	at->epoch = word >> 32;
	at->aliased = *(volatile u32 *)&pair->aliased;
	u64 open_after = *(volatile u64 *)&pair->open_after_ns;
	/* No process has to run for either. The lease by the fine clock: after a pause of the whole machine the coarse one stands still until the next tick. */
	if (deadline && bpf_ktime_get_ns() > deadline)
		at->state = HALTED ^ *(volatile u32 *)&pair->zero; /* a constant would double the ways that the verifier follows */
	else if (open_after && bpf_ktime_get_coarse_ns() > open_after && nic->role == ROLE_PRIMARY && (at->state == LOCKSTEP || at->state == CHECKPOINTING))
		at->state = PASSTHROUGH ^ *(volatile u32 *)&pair->zero;
	return true;
}

/* This CPU's notes, the packet cleared but for its NIC. */
static __always_inline struct scratch *fresh_scratch(const struct place *at)
{
	u32 zero = 0;
	struct scratch *s = scratch.lookup(&zero);
	if (s) {
		__builtin_memset(&s->packet, 0, sizeof(s->packet));
		s->packet.key.nic = at->nic->id;
		s->edits.count = 0;
	}
	return s;
}

/* The NIC whose vif this is. A hint says where it was found last: that and a look whether it is still there cost a tenth of a search in the hash map. */
static __always_inline bool place_of_vif(struct place *at, u32 ifindex)
{
	u32 bucket = ifindex & (VIF_HINTS - 1), *hint = vif_hints.lookup(&bucket);
	if (!hint)
		return false;
	u32 id = *hint;
	struct nic *nic = nic_by_id.lookup(&id);
	if (!nic || nic->vif != ifindex) {
		nic = nics.lookup(&ifindex);
		if (!nic)
			return false;
		id = *hint = nic->id;
	}
	return place_of(at, nic_by_id.lookup(&id)); /* looked up once more, or the verifier would follow both ways to the end */
}

/* The vif of the SVM that an epoch has: one write of the pair's word exchanges the SVM together with its translations. */
static __always_inline u32 vif_in(const struct nic *nic, u32 epoch)
{
	return nic->next_vif && (s32)(epoch - nic->next_epoch) >= 0 ? nic->next_vif : nic->vif;
}

/* Between that write and the next one, which says that the new SVM is there: there may still be a way back. */
static __always_inline bool on_trial(const struct place *at) { return at->nic->next_vif && at->epoch == at->nic->next_epoch; }

/* From when on an unproven packet of the pair is late. */
static __always_inline s64 compare_timeout(const struct place *at)
{
	struct pair *pair = pairs.lookup(&at->nic->pair);
	return pair && pair->compare_timeout_ns ? pair->compare_timeout_ns : at->set->compare_timeout_ns;
}

/* Does a walk over what is held begin with this frame? Only without protection, and not with every one. */
static __always_inline bool walk_due(const struct place *at)
{
	u64 now = bpf_ktime_get_coarse_ns(), *last = walks.lookup(&at->nic->id);
	if (at->state != PASSTHROUGH || at->nic->role != ROLE_PRIMARY || !last || (*last && now - *last < WALK_PAUSE_NS))
		return false;
	*last = now; /* two CPUs at once begin two walks, which does no harm */
	return true;
}

static __always_inline bool place_of_id(struct place *at, u32 id)
{
	return place_of(at, nic_by_id.lookup(&id));
}

static __always_inline void drop(const struct place *at, u32 why)
{
	at->count->dropped[why & 31]++;
}

/* P2's packet goes on to the client: it gets the numbers that the client knows (bpf/alias.h), if there are connections that have others. */
static __always_inline int to_client(struct __sk_buff *skb, const struct place *at)
{
	if (!at->aliased)
		return VERDICT_PASS;
	tc_stages.call(skb, STAGE_P2_ALIAS);
	return VERDICT_DROP; /* never: a call is always left for it */
}

/* Only what a program of ours sent into the vif carries this mark. */
static __always_inline bool is_ours(const struct place *at, u32 mark) { return !((mark ^ at->set->mark) & ~FLOW_MASK); }

/* The source is the guest; a NIC without a MAC takes any. */
static __always_inline bool from_guest(const struct nic *nic, const u8 *eth)
{
	const u16 *is = (const u16 *)(eth + 6);
	u16 a = nic->mac[0] | nic->mac[1] << 8, b = nic->mac[2] | nic->mac[3] << 8, c = nic->mac[4] | nic->mac[5] << 8;
	if (!(a | b | c))
		return true;
	return a == is[0] && b == is[1] && c == is[2];
}

/* `x`, by way of a map: the verifier knows nothing of it any more, so what follows is followed once and not for each value it might have had. */
static __always_inline u32 forget(struct scratch *notes, u32 cell, u32 x)
{
	volatile u32 *c = &notes->cell[cell];
	*c = x;
	return *c;
}

/* A frame that is none of a flow's business: which policy its class has. */
static __always_inline u32 policy_of(const struct nic *nic, const struct packet *p)
{
	if (p->class == CLASS_ARP)
		return nic->arp;
	if (p->class == CLASS_ND)
		return nic->nd;
	if (p->class == CLASS_OTHER)
		return nic->other;
	return POLICY_COMPARE;
}

static __always_inline bool is_exempt(const struct nic *nic, const struct flow_key *key)
{
	struct exempt_key k = {};
	if (!nic->exempts || key->kind == KIND_FRAME || key->kind == KIND_FRAGMENT)
		return false;
	k.prefixlen = 32 + 128;
	k.proto = key->proto;
	k.nic = key->nic;
	k.guest_port = key->guest_port;
	__builtin_memcpy(k.remote, key->remote, 16);
	if (exempt.lookup(&k))
		return true;
	k.guest_port = 0;
	return exempt.lookup(&k) != NULL;
}

/* Tell user space. Losing an event loses no packet: the sweep finds what waits. */
static __always_inline void tell(const struct place *at, u32 kind, u32 reason, u32 index, const struct flow_key *key, u32 offset, u64 pvm, u64 svm)
{
	struct event *last = last_events.lookup(&kind), *e = events.ringbuf_reserve(sizeof(struct event));
	if (!e) {
		at->count->events_lost++;
		return;
	}
	e->kind = kind;
	e->reason = reason;
	e->time_ns = bpf_ktime_get_ns();
	e->nic = at->nic->id;
	e->flow = index;
	e->epoch = at->epoch;
	e->offset = offset;
	e->pvm_digest = pvm;
	e->svm_digest = svm;
	if (key)
		e->key = *key;
	else
		__builtin_memset(&e->key, 0, sizeof(e->key));
	if (last)
		*last = *e;
	events.ringbuf_submit(e, 0);
}

static __always_inline bool seq_lt(u32 a, u32 b) { return (s32)(a - b) < 0; }
static __always_inline bool seq_le(u32 a, u32 b) { return (s32)(a - b) <= 0; }
