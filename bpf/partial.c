/* The first half of a held packet. The SVM's segments end elsewhere than the PVM's: when it sends again what is matched, but the packet that it matches
 * in part can't leave, the client never acknowledges that part, so the SVM repeats it for ever and never comes to the rest. Then the matched part
 * leaves on its own; the packet stays in its place and leaves whole when the rest is proven (the client drops what it has). */

/* Are the PVM's bytes of the matched part those that the SVM has said? So far only the sum of the whole packet is to be compared, when its rest has come: what
 * of it is still missing must be the rest's. By the owner, without the lock. */
static __always_inline bool said_so(const struct flow *f, const struct held *h, const struct slot *slot, const struct hash_keys *keys, u64 *rest)
{
	struct view v = {.data = (void *)slot->byte, .len = h->len, .slot = true};
	u32 from = f->matched, fin = !!(h->flags & HELD_FIN), end = h->end - fin;
	bool ok = true;

	*rest = range_hash(keys, &v, h->payload + (from - h->start), end - from, from, true, &ok);
	if (fin)
		*rest += fin_hash(keys, end);
	return ok && *rest == h->digest;
}

/* Tail-called by P4, which made itself the flow's owner. */
int partial(struct __sk_buff *skb)
{
	u32 zero = 0, index = skb->cb[CB_FLOW], cpu = bpf_get_smp_processor_id(), ack = 0, cut = 0, staged = 0;
	struct flow *f = flows.lookup(&index);
	struct held_table *t = held.lookup(&zero);
	struct hash_keys *keys = hash_keys.lookup(&zero);
	struct scratch *notes = scratch.lookup(&zero);
	struct held part = {};
	struct place at;
	struct finding found = {};
	bool any = false, work = false, same = false;
	u64 rest = 0;
	u16 win = 0;

	if (!f || !t || !keys || !notes || !place_of_id(&at, f->key.nic))
		return VERDICT_DROP;
	u32 head = f->p_head;
	struct held *h = record(t, head);
	struct slot *slot = slab.lookup(&head);
	if (slot && partly_matched(f, h))
		same = said_so(f, h, slot, keys, &rest);
	same = forget(notes, 0, same);
	bpf_spin_lock(&f->lock);
	if (head != NONE && at.state == LOCKSTEP && f->epoch == at.epoch && partly_matched(f, h) && may_emit(f, cpu, notes->now)) {
		if (!same) {
			diverge(f, &found, REASON_PAYLOAD, f->proven, h->digest, rest);
			goto unlock;
		}
		account_release(f, h, &ack, &win);
		part = *h;
		cut = f->matched - h->start;
		note_emit(f, cpu, notes->now);
		any = true;
	}
unlock:
	bpf_spin_unlock(&f->lock);
	if (found.any) {
		at.count->divergences[found.reason & 15]++;
		tell(&at, EVENT_DIVERGENCE, found.reason, index, &f->key, found.offset, found.pvm, found.svm);
	}

	u32 l4 = part.l4, payload = part.payload, l3 = 14 + (f->key.vlan[0] ? 4 : 0) + (f->key.vlan[1] ? 4 : 0), len = payload + cut;
	if (any && slot && l4 <= 512 && l4 >= l3 + 20 && payload >= l4 + 20 && len <= SLOT_BYTES - 64) {
		BOUND(l3, 0x1f);
		BOUND(l4, 0x3ff);
		BOUND(len, SLOT_BYTES - 1);
		u8 *ip = slot->byte + l3, *tcp = slot->byte + l4;
		u32 *behind = (u32 *)(slot->byte + len), kept = *behind, l4_len = len - l4;
		u64 ip_kept = *(u64 *)(ip + 4), tcp_kept[2] = {*(u64 *)(tcp + 8), *(u64 *)(tcp + 16)};
		u16 ip_length = *(u16 *)(ip + 2), ip_check = *(u16 *)(ip + 10);
		bool ip4 = f->key.guest[2] == bpf_htonl(0xffff) && !f->key.guest[0] && !f->key.guest[1];
		if (ip4) {
			*(u16 *)(ip + 2) = bpf_htons(len - l3);
			*(u16 *)(ip + 10) = sum_replace(ip_check, ip_length, bpf_htons(len - l3));
		} else {
			*(u16 *)(ip + 4) = bpf_htons(len - l3 - 40);
		}
		*(u32 *)(tcp + 8) = bpf_htonl(ack);
		tcp[13] &= ~TCP_FIN;
		*(u16 *)(tcp + 14) = bpf_htons(win);
		*(u16 *)(tcp + 16) = 0;
		*behind = 0; /* the sum goes by fours */
		*(u16 *)(tcp + 16) = ~fold(slot_sum(slot, l4, l4_len) + pseudo_sum(&f->key, l4_len));
		*behind = kept;
		part.len = len;
		staged = load_vessel(skb, &at, slot, &part, index, f->generation, 0);
		*(u64 *)(tcp + 8) = tcp_kept[0];
		*(u64 *)(tcp + 16) = tcp_kept[1];
		if (ip4) {
			*(u16 *)(ip + 2) = ip_length;
			*(u16 *)(ip + 10) = ip_check;
		} else {
			*(u64 *)(ip + 4) = ip_kept;
		}
		at.count->partial++;
	}
	if (any && !staged)
		drop(&at, DROP_EMIT);
	bpf_spin_lock(&f->lock);
	if (f->work) {
		f->work = 0;
		work = true;
	} else {
		f->owner = 0;
	}
	bpf_spin_unlock(&f->lock);
	if (work) {
		skb->cb[CB_MODE] = 0;
		skb->cb[CB_OWN] = 0;
		skb->cb[CB_STAGED] = staged;
		skb->cb[CB_PARTIAL] = 0;
		tc_stages.call(skb, STAGE_DRAIN);
	}
	return staged ? bpf_redirect(at.nic->vif, BPF_F_INGRESS) : VERDICT_DROP;
}
