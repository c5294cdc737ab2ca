/* A super-packet of the PVM (GSO: up to 64 KiB, its checksum partial) as the wire-sized packets that it stands for. Each gets a slot, its own
 * headers and a whole checksum. When all of them turn out to be proven and first in their flow, pass_whole() lets the super-packet go as it came.
 * Tail-called by P2, which has found the flow, and by itself for the next batch. */

/* The headers of segment `n`, of `len` bytes of payload at `off`, over those of the super-packet. Field by field what the kernel's GSO does. */
static __always_inline void segment_headers(struct slot *slot, struct packet *p, u32 n, u32 off, u32 len, bool last)
{
	u32 l3 = p->l3, l4 = p->l4;
	u64 sum;

	if (l3 > 64 || l4 > 512)
		return;
	BOUND(l3, 0x7f);
	BOUND(l4, 0x3ff);
	u8 *ip = slot->byte + l3, *h = slot->byte + l4;
	if (p->ip6) {
		*(u16 *)(ip + 4) = bpf_htons(p->payload - l3 - 40 + len);
	} else {
		u32 head = l4 - l3;
		*(u16 *)(ip + 2) = bpf_htons(p->payload - l3 + len);
		*(u16 *)(ip + 4) = bpf_htons(be16_at(ip + 4) + n);
		*(u16 *)(ip + 10) = 0;
		BOUND(head, 0x3c);
		sum = (u32)bpf_csum_diff(NULL, 0, (void *)ip, head, 0);
		*(u16 *)(ip + 10) = ~fold(sum);
	}
	p->length = len;
	u32 end = p->payload + len;
	if (end > SLOT_BYTES - 64)
		return;
	BOUND(end, SLOT_BYTES - 1);
	*(u32 *)(slot->byte + end) = 0; /* the sum goes by fours */
	if (p->key.kind == KIND_TCP) {
		p->seq += off;
		*(u32 *)(h + 4) = bpf_htonl(p->seq);
		if (!last)
			p->tcp_flags &= ~(TCP_FIN | TCP_PSH);
		if (n)
			p->tcp_flags &= ~0x80; /* CWR: once */
		h[13] = p->tcp_flags;
		*(u16 *)(h + 16) = 0;
	} else {
		*(u16 *)(h + 4) = bpf_htons(8 + len);
		*(u16 *)(h + 6) = 0;
	}
	sum = slot_sum(slot, l4, p->payload - l4 + len) + pseudo_sum(&p->key, p->payload - l4 + len);
	u16 check = ~fold(sum);
	if (p->key.kind == KIND_TCP)
		*(u16 *)(h + 16) = check;
	else
		*(u16 *)(h + 6) = check ? check : 0xffff;
}

/* `kind` and `batch` are constant: the verifier can't follow the search for equal datagrams more than once in a program. */
static __always_inline int split_packet(struct __sk_buff *skb, u32 kind, int batch, u32 stage)
{
	u32 zero = 0, own = skb->cb[CB_OWN], next = skb->cb[CB_SEGMENT], gso = skb->gso_size, why = DROP_BAD_GSO;
	u32 tagged = skb->vlan_present ? 4 : 0;
	struct held_table *t = held.lookup(&zero);
	struct hash_keys *keys = hash_keys.lookup(&zero);
	u64 now = bpf_ktime_get_ns();
	struct flow_ref ref = {.index = skb->cb[CB_FLOW], .generation = skb->cb[CB_GENERATION]};
	struct flow *f = flows.lookup(&ref.index);
	struct place at;
	bool done = false, drains = false, whole = false;
	u32 l4 = 0, sack = 0, steps = 0;

	if (!t || !f || !keys || !gso || !place_of_vif(&at, skb->ifindex))
		return VERDICT_DROP;
#pragma nounroll
	for (int i = 0; i < batch; i++) {
		struct scratch *notes = fresh_scratch(&at);
		if (!notes)
			return VERDICT_DROP;
		struct packet *p = &notes->packet;
		u32 ack, used = NONE, index = take_slot(&at);
		u16 win;
		if (index == NONE) {
			watch_slab(&at);
			done = true;
			break;
		}
		struct slot *slot = slab.lookup(&index);
		if (!slot)
			return VERDICT_DROP;
		u32 len = load_slot(skb, slot);
		struct view v = {.data = slot->byte, .len = len, .slot = true, .part = true};
		parse(&v, p, len, false);
		u32 off = next * gso, total = p->length, payload = p->payload;
		if (p->key.kind != kind || payload + total != skb->len + tagged || payload > 511 || off >= total ||
		    (p->tcp_flags & (TCP_SYN | TCP_RST))) {
			give_slot(index);
			drop(&at, why);
			return VERDICT_DROP;
		}
		u32 n = total - off;
		bool last = n <= gso;
		if (!last)
			n = gso;
		if (payload + n > SLOT_BYTES - 65) { /* a segment that no slot takes: the vif's MTU is larger than the dataplane's */
			give_slot(index);
			drop(&at, DROP_TOO_LONG);
			return VERDICT_DROP;
		}
		u32 copy = n;
		copy -= 1; /* never zero: the helper's demand */
		BOUND(copy, SLOT_BYTES - 1);
		copy += 1;
		BOUND(payload, 511);
		if ( bpf_skb_load_bytes(skb, payload - tagged + off, slot->byte + payload, copy)) {
			give_slot(index);
			drop(&at, why);
			return VERDICT_DROP;
		}
		segment_headers(slot, p, next, off, n, last);
		v.len = payload + n;
		v.part = false;
		struct held *h = record(t, index);
		describe(h, notes, &v, keys, at.epoch, now);
		h->len = payload + n;
		h->hash = skb->hash;
		l4 = p->l4;
		sack = h->sack;
		u32 take = p_take(f, t, &at, &ref, index, now, kind, false, &ack, &win, &used);
		used = forget(notes, 0, used);
		take = forget(notes, 1, take);
		l4 = forget(notes, 2, l4);
		sack = forget(notes, 3, sack);
		if (used != NONE) {
			at.count->svm_unparked++;
			give_slot(used);
		}
		if (take != TAKE_HOLD) {
			give_slot(index);
			drop(&at, take == TAKE_FULL ? DROP_FIFO_FULL : DROP_FLOW_RACE);
			done = true; /* the rest is refused too, so that the order stays */
			break;
		}
		at.count->segments++;
		at.count->held_packets++;
		own++;
		next++;
		if (last) {
			done = whole = true;
			break;
		}
	}
	if (!done) {
		skb->cb[CB_OWN] = own;
		skb->cb[CB_SEGMENT] = next;
		tc_stages.call(skb, stage);
	}
	watch_slab(&at);
	bpf_spin_lock(&f->lock);
	if (same_flow(f, ref.generation) && f->p_count) {
		if (f->owner) {
			f->work = 1;
		} else if (at.state != CHECKPOINTING && (at.state == PASSTHROUGH || f->s_count || f->epoch != at.epoch || releasable(f, record(t, f->p_head)))) {
			f->owner = 1;
			drains = true;
			steps = own + f->s_count;
		}
	}
	bpf_spin_unlock(&f->lock);
	if (drains) {
		/* Before it passes whole nothing is sent that would come back and go on, so the calls that are left must do for all of it. */
		bool fits = (next + batch - 1) / batch + steps / DRAIN_STEPS + 5 <= TAIL_CALLS;
		struct scratch *notes = scratch.lookup(&zero);
		if (notes)
			notes->now = now;
		skb->cb[CB_FLOW] = ref.index;
		skb->cb[CB_MODE] = MODE_PARTIAL;
		skb->cb[CB_OWN] = whole && fits && !sack ? own : 0; /* with refused segments the super-packet must not pass */
		skb->cb[CB_STAGED] = 0;
		skb->cb[CB_PARTIAL] = l4;
		tc_stages.call(skb, STAGE_DRAIN);
		give_up(&at, f, ref.index);
	}
	watch_flow(&at, f, t, ref.index, now);
	return VERDICT_DROP;
}

int split(struct __sk_buff *skb)
{
	return split_packet(skb, KIND_TCP, GSO_BATCH, STAGE_SPLIT);
}

/* UDP with segmentation offload (UDP_SEGMENT, virtio's USO): 64 segments at most (UDP_MAX_SEGMENTS). */
int split_udp(struct __sk_buff *skb)
{
	return split_packet(skb, KIND_UDP, GSO_BATCH_UDP, STAGE_SPLIT_UDP);
}
