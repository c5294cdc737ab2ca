/* From a parsed packet to the record that is compared: which kind of thing it is, which range, which digest. The same for both VMs' output. */

#define SYN_SACK_OK (1ull << 36) /* option kind 4 in the word that walk_options() makes */

/* Walks the TCP options, for what of a SYN both sides must agree on: MSS, window scale, SACK permitted, timestamps on or off, in one word in `h->digest`;
 * other kinds count as bits. And for a SACK option, whose offset goes to `h->sack`. (Into the map, not into variables: see struct scratch.) */
static __always_inline void walk_options(struct held *h, const struct view *v, const struct packet *p)
{
	u32 off = p->l4 + 20, end = off + p->options;

#pragma nounroll
	for (int i = 0; i < MAX_OPTIONS; i++) {
		u8 *o = known_at(v, off, 1); /* parse() has seen that the whole header is there */
		u32 len = 1;
		if (off >= end || !o || *o == 0)
			return;
		if (*o != 1) {
			u8 *l = known_at(v, off, 2);
			if (!l || off + 2 > end)
				break;
			len = l[1];
			if (len < 2 || off + len > end)
				break;
			u8 *mss = known_at(v, off, 4), *scale = known_at(v, off, 3); /* 3 bytes may be the frame's last */
			if (*o == 2 && len == 4 && mss)
				h->digest |= (u64)(mss[2] << 8 | mss[3]) << 8;
			else if (*o == 3 && len == 3 && scale)
				h->digest |= (u64)(0x80 | (scale[2] & 15)) << 24;
			else if (*o == 5)
				h->sack = off;
			else
				h->digest |= 1ull << (32 + (*o & 15));
		}
		off += len;
		BOUND(off, MAX_FRAME);
	}
	h->digest |= 1ull << 63; /* malformed, or too many: equal only to the like */
}

#define MAX_EXTRA 127 /* bytes; IPv4 options are 40 at most, and IPv6 extension headers seldom more than 32 */

/* What stands between the fixed IP header and the layer above goes into the flow's key. A frame of `all` bytes with more of it is compared as a whole.
 * False: it is not all there. */
static __always_inline bool note_extra(struct scratch *notes, const struct view *v, const struct hash_keys *keys, u32 all)
{
	struct packet *p = &notes->packet;
	u32 fixed = p->l3 + (p->ip6 ? 40 : 20), len = p->l4 - fixed;
	bool ok = true;

	if (p->key.kind == KIND_FRAME || p->key.kind == KIND_FRAGMENT || p->l4 <= fixed)
		return true;
	if (len > MAX_EXTRA) {
		whole_frame(p, all);
		return true;
	}
	u32 extra = range_hash(keys, v, fixed, len, 0, false, &ok);
	if (p->atomic) { /* its identification is never compared: out of the sum again */
		u32 *id = peek(v, p->atomic + 4, 4);
		if (id)
			extra -= *keys_at(keys, (p->atomic + 4 - fixed) >> 2, false) * *id;
	}
	p->key.extra = 1 | forget(notes, 0, extra);
	return ok;
}

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
		u32 *first = known_at(v, p->l4 + 20, 4);
		if ((flags & TCP_SYN) || p->options > STAMPS_LEN || (p->options && first && *first != bpf_htonl(STAMPS)))
			walk_options(h, v, p);
		u64 options = h->digest;
		h->digest = 0;
		stream = 1;
		pos = h->from = h->start = h->end = p->seq;
		h->ack = p->ack;
		h->win = p->win;
		if (flags & TCP_ACK)
			h->flags |= HELD_ACKS;
		if (flags & TCP_RST) {
			h->type = HELD_RST;
			h->digest = word_mix(keys, pos);
			len = 0;
		} else if (flags & TCP_SYN) {
			h->type = HELD_SYN;
			if (options & SYN_SACK_OK)
				h->flags |= HELD_SACK_OK;
			h->end += 1 + len + (flags & TCP_FIN);
			h->digest = word_mix(keys, options << 8 ^ (flags & ~TCP_PSH) ^ (u64)len << 48);
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
