/* From a parsed packet to the record that is compared: which kind of thing it is, which range, which digest. The same for both VMs' output. */

static __always_inline bool describe(struct held *h, struct scratch *notes, const struct view *v, const struct hash_keys *keys, u32 epoch, u64 now)
{
	const struct packet *p = &notes->packet;
	u32 pos = 0, len = p->length;
	bool ok = true;
	u32 stream = 0;

	h->next = NONE;
	h->flow = NONE;
	h->digest = 0;
	h->since_ns = now;
	h->from = h->start = h->ack = 0;
	h->end = len;
	h->epoch = epoch;
	h->win = 0;
	h->l4 = p->l4;
	h->payload = p->payload;
	h->flags = 0;
	h->type = HELD_DATAGRAM;
	h->sack = 0;
	if (p->key.kind == KIND_TCP) {
		u8 flags = p->tcp_flags;
		stream = 1;
		pos = h->from = h->start = h->end = p->seq;
		h->ack = p->ack;
		h->win = p->win;
		if (flags & TCP_ACK)
			h->flags = HELD_ACKS;
		if (flags & TCP_RST) {
			h->type = HELD_RST;
			h->digest = word_mix(keys, pos);
			len = 0;
		} else if (flags & TCP_SYN) {
			h->type = HELD_SYN;
			h->end += 1 + len + (flags & TCP_FIN);
			h->digest = word_mix(keys, syn_options(v, p) << 8 ^ (flags & ~TCP_PSH) ^ (u64)len << 48);
			pos = 1; /* its data (RFC 7413) stand behind an ISN that differs */
		} else if (len || (flags & TCP_FIN)) {
			h->type = HELD_DATA;
			h->end += len;
			if (flags & TCP_FIN) {
				h->flags |= HELD_FIN;
				h->digest = fin_hash(keys, h->end);
				h->end++;
			}
		} else {
			h->type = HELD_ACK;
		}
	} else if (p->key.kind == KIND_FRAGMENT) {
		h->type = HELD_FRAGMENT;
		h->start = p->frag_id;
		pos = h->from = p->from;
		h->end = p->from + len;
		if (!p->more)
			h->flags = HELD_LAST;
	}
	pos = forget(notes, 0, pos);
	len = forget(notes, 1, len);
	stream = forget(notes, 2, stream);
	h->digest += range_hash(keys, v, p->payload, len, pos, stream, &ok);
	if (p->key.kind == KIND_IP && (p->key.proto == IPPROTO_ICMP || p->key.proto == IPPROTO_ICMPV6) && len >= 4) {
		u16 *check = peek(v, p->payload + 2, 2);
		if (check) /* never compared: out of the sum again, it is the upper half of the first word */
			h->digest -= *keys_at(keys, 0, false) * ((u32)*check << 16);
	}
	return ok;
}
