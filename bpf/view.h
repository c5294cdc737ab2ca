/* Bytes of a frame, wherever they lie: in a packet that a program reads directly, or in a slot of the slab. */

/* Shows the verifier a bound that holds already, in a way that clang can't take out again. It also makes the states of different ways through a loop
 * equal, without which the verifier would follow each of them to the end. */
#define BOUND(x, mask) asm volatile("%0 &= %1" : "+r"(x) : "i"(mask))

struct view {
	void *data;
	void *end; /* packets: data_end */
	u32 len;   /* slots: bytes of the frame */
	bool part; /* only the beginning of a super-packet is here: its lengths reach further */
	bool slot; /* constant at each use, so that one of the two bounds checks goes away */
};

/* `n` bytes (at most 64) at `off`, or NULL if the frame ends before. */
static __always_inline void *peek(const struct view *v, u32 off, u32 n)
{
	if (v->slot) {
		if (off > SLOT_BYTES - 64 || off + n > v->len)
			return NULL;
		BOUND(off, SLOT_BYTES - 1);
		return v->data + off;
	}
	if (off > MAX_FRAME)
		return NULL;
	BOUND(off, MAX_FRAME);
	void *p = v->data + off;
	if (p + n > v->end)
		return NULL;
	return p;
}

/* `n` bytes at `off`, known to be there: slots are padded, so a mask is enough; of packets the verifier wants to see it again. */
static __always_inline void *known_at(const struct view *v, u32 off, u32 n)
{
	if (!v->slot)
		return peek(v, off, n);
	BOUND(off, SLOT_BYTES - 1);
	return v->data + off;
}

static __always_inline u16 be16_at(const void *p) { return bpf_ntohs(*(const u16 *)p); }
static __always_inline u32 be32_at(const void *p) { return bpf_ntohl(*(const u32 *)p); }
