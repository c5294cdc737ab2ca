/* From a frame's bytes to the flow it belongs to and the range of it that is compared. Nothing in here looks at a map. */

enum packet_class { CLASS_FLOW, CLASS_ARP, CLASS_ND, CLASS_OTHER };

/* The whole frame is what is compared: it can't be parsed, or it is no IP. */
static __always_inline void whole_frame(struct packet *p, u32 len)
{
	u16 nic = p->key.nic;
	__builtin_memset(&p->key, 0, sizeof(p->key));
	p->key.nic = nic;
	p->key.kind = KIND_FRAME;
	p->payload = 0;
	p->l4_check = 0;
	p->length = len;
	p->tcp_flags = 0;
	p->from = 0;
}

/* From the byte behind the last IP header: `proto` over `left` bytes at `off`. False: not well formed. `input`: from the client. */
static __always_inline bool parse_l4(const struct view *v, struct packet *p, u32 off, u32 left, u8 proto, bool input)
{
	p->key.proto = proto;
	p->l4 = off;
	p->payload = off;
	p->length = left;
	p->key.kind = KIND_IP;
	if (proto == IPPROTO_TCP) {
		u8 *h = peek(v, off, 20);
		if (!h || left < 20)
			return false;
		u32 head = (h[12] >> 4) * 4;
		if (head < 20 || head > left)
			return false;
		p->key.kind = KIND_TCP;
		p->key.guest_port = *(u16 *)(h + (input ? 2 : 0));
		p->key.remote_port = *(u16 *)(h + (input ? 0 : 2));
		p->seq = be32_at(h + 4);
		p->ack = be32_at(h + 8);
		p->tcp_flags = h[13];
		p->win = be16_at(h + 14);
		p->l4_check = off + 16;
		p->options = head - 20;
		p->payload = off + head;
		p->length = left - head;
	} else if (proto == IPPROTO_UDP) {
		u8 *h = peek(v, off, 8);
		if (!h || left < 8)
			return false;
		u32 len = be16_at(h + 4);
		if (len < 8 || len != left)
			return false; /* bytes behind the datagram (RFC 9868) are output too: the frame is compared as a whole */
		p->key.kind = KIND_UDP;
		p->key.guest_port = *(u16 *)(h + (input ? 2 : 0));
		p->key.remote_port = *(u16 *)(h + (input ? 0 : 2));
		p->l4_check = off + 6;
		p->payload = off + 8;
		p->length = len - 8;
	} else if (proto == IPPROTO_ICMPV6 && p->ip6) {
		u8 *h = peek(v, off, 4);
		/* RFC 4861: router and neighbour solicitation, advertisement, redirect. With them MLD (RFC 2710, RFC 3810), which answers after
		 * random delays: no two VMs agree on those. */
		if (h && ((h[0] >= 133 && h[0] <= 137) || (h[0] >= 130 && h[0] <= 132) || h[0] == 143))
			p->class = CLASS_ND;
	}
	return true;
}

static __always_inline bool parse_ip4(const struct view *v, struct packet *p, u32 off, bool input)
{
	u8 *h = peek(v, off, 20);
	if (!h)
		return false;
	u32 head = (h[0] & 15) * 4, total = be16_at(h + 2), frag = be16_at(h + 6);
	if ((h[0] >> 4) != 4 || head < 20 || total < head || (!v->part && !peek(v, off + total - 1, 1)))
		return false;
	p->key.guest[2] = p->key.remote[2] = bpf_htonl(0xffff);
	p->key.guest[3] = *(u32 *)(h + (input ? 16 : 12));
	p->key.remote[3] = *(u32 *)(h + (input ? 12 : 16));
	if (frag & 0x3fff) { /* MF or an offset */
		if (head != 20) /* the fragments of one datagram may differ in their options */
			return false;
		p->key.kind = KIND_FRAGMENT;
		p->key.proto = h[9];
		p->frag_id = be16_at(h + 4);
		p->from = (frag & 0x1fff) * 8;
		p->more = !!(frag & 0x2000);
		p->l4 = p->payload = off + head;
		p->length = total - head;
		return p->length != 0;
	}
	return parse_l4(v, p, off + head, total - head, h[9], input);
}

static __always_inline bool parse_ip6(const struct view *v, struct packet *p, u32 off, bool input)
{
	u8 *h = peek(v, off, 40);
	if (!h || (h[0] >> 4) != 6)
		return false;
	u32 left = be16_at(h + 4);
	u8 next = h[6];
	if (left && !v->part && !peek(v, off + 40 + left - 1, 1))
		return false;
	p->ip6 = 1;
	__builtin_memcpy(p->key.guest, h + (input ? 24 : 8), 16);
	__builtin_memcpy(p->key.remote, h + (input ? 8 : 24), 16);
	off += 40;
#pragma nounroll
	for (int i = 0; i < MAX_EXT; i++) {
		u32 len;
		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS && next != IPPROTO_FRAGMENT && next != IPPROTO_AH)
			return parse_l4(v, p, off, left, next, input);
		u8 *e = peek(v, off, 8);
		if (!e || left < 8)
			return false;
		if (next == IPPROTO_FRAGMENT) {
			u32 frag = be16_at(e + 2);
			if (frag & 0xfff9) { /* an atomic fragment (RFC 6946) is a whole datagram */
				if (off != p->l3 + 40)
					return false;
				p->key.kind = KIND_FRAGMENT;
				p->key.proto = e[0];
				p->frag_id = be32_at(e + 4);
				p->from = frag & 0xfff8;
				p->more = frag & 1;
				p->l4 = p->payload = off + 8;
				p->length = left - 8;
				return p->length != 0;
			}
			p->atomic = off;
			len = 8;
		} else if (next == IPPROTO_AH) {
			len = (e[1] + 2) * 4;
		} else {
			len = (e[1] + 1) * 8;
		}
		if (len > left)
			return false;
		next = e[0];
		off += len;
		left -= len;
		BOUND(off, MAX_FRAME);
	}
	return false; /* a longer chain is compared as a whole frame */
}

/* Fills `p` (zeroed but for key.nic). `input`: client to guest; otherwise the guest's output. */
static __always_inline void parse(const struct view *v, struct packet *p, u32 len, bool input)
{
	u8 *eth = peek(v, 0, 14);
	u32 off = 14;
	bool ok = false;
	u16 type;

	p->class = CLASS_FLOW;
	if (!eth) {
		whole_frame(p, len);
		return;
	}
	type = be16_at(eth + 12);
#pragma unroll
	for (int i = 0; i < 2; i++) {
		if (type != ETH_P_8021Q_ && type != ETH_P_8021AD_)
			break;
		u8 *tag = peek(v, off, 4);
		if (!tag) {
			whole_frame(p, len);
			return;
		}
		p->key.vlan[i] = TAG_PRESENT | (type == ETH_P_8021AD_ ? TAG_AD : 0) | (be16_at(tag) & 0xfff);
		type = be16_at(tag + 2);
		off += 4;
	}
	p->l3 = off;
	if (type == ETH_P_IP_)
		ok = parse_ip4(v, p, off, input);
	else if (type == ETH_P_IPV6_)
		ok = parse_ip6(v, p, off, input);
	else
		p->class = type == ETH_P_ARP_ ? CLASS_ARP : CLASS_OTHER;
	if (!ok)
		whole_frame(p, len);
}

/* A view of a packet of tc's for parse(), by direct access; its headers are pulled in front if they are not. The tag beside it is not part of the
 * offsets. */
static __always_inline struct view look(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	if (data + 128 > end && data + skb->len > end)
		bpf_skb_pull_data(skb, skb->len < 256 ? skb->len : 256);
	struct view v = {.data = (void *)(long)skb->data, .end = (void *)(long)skb->data_end, .part = true};
	return v;
}

static __always_inline void tag_beside(struct __sk_buff *skb, struct packet *p)
{
	if (!skb->vlan_present)
		return;
	p->key.vlan[1] = p->key.vlan[0];
	p->key.vlan[0] = TAG_PRESENT | (skb->vlan_proto == bpf_htons(ETH_P_8021AD_) ? TAG_AD : 0) | (skb->vlan_tci & 0xfff);
}
