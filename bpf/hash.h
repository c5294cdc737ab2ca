/* The keyed hash of a byte range: sum over its 4-byte words (aligned to the position, not to the packet) of key[position] * word, mod 2^64.
 *
 * It is multilinear hashing (Carter & Wegman; Lemire & Kaser, "Strongly universal string hashing is fast"): for words of 32 bits and random
 * keys of 64, two different ranges agree with probability 2^-33 at worst, 2^-64 typically. Being linear it can be cut anywhere: the hash of a
 * range is the sum of its parts' wherever the borders are, which is what comparing TCP streams with different segments needs. Position
 * counts, every byte counts. Two lanes of sums keep the multiplier busy; more would not fit BPF's registers. */

static __always_inline u64 word_hash(const u64 *key, u64 w)
{
	return key[0] * (u32)w + key[1] * (w >> 32);
}

/* The same of the 8 bytes at `w`, in two loads: without the shifts a round has no spills in BPF's ten registers. */
static __always_inline u64 bytes_hash(const u64 *key, const u64 *w)
{
	const u32 *half = (const u32 *)w;
	return key[0] * half[0] + key[1] * half[1];
}

/* Keys from word `word` on; streams and datagrams have a table each. */
static __always_inline const u64 *keys_at(const struct hash_keys *keys, u32 word, u32 stream)
{
	word &= stream ? STREAM_WORDS - 1 : DGRAM_WORDS - 1;
	return (stream ? keys->stream : keys->datagram) + word;
}

/* Hash of `len` bytes at offset `off` of `v`, which stand at position `pos`. *ok is cleared if they are not all there. */
static __always_inline u64 range_hash(const struct hash_keys *keys, const struct view *v, u32 off, u32 len, u32 pos, u32 stream, bool *ok)
{
	u32 phase = pos & 7, word = (pos & ~7u) >> 2;
	u32 here = off - phase, words = (phase + len) >> 3, rest = (phase + len) & 7;
	u64 sum = 0, a = 0, b = 0, first = 0, *w;

	if (!len)
		return 0;
	/* Nothing starts before byte 8 but whole frames, which are longer than that and at phase 0. */
	if (len > SLOT_BYTES || (off < 8 && (phase || len < 8)) || !peek(v, off + len - 1, 1)) {
		*ok = false;
		return 0;
	}
	if (words) {
		w = known_at(v, here, 8);
		if (w)
			first = *w;
	}
	const u64 *table = stream ? keys->stream : keys->datagram;
	u32 mask = stream ? STREAM_WORDS - 1 : DGRAM_WORDS - 1;
#pragma nounroll
	for (int i = 0; i < HASH_ROUNDS; i++) {
		if (words < 16)
			break;
		w = known_at(v, here, 128);
		if (!w)
			break;
		u32 at_word = word & mask;
		BOUND(at_word, DGRAM_WORDS - 1);
		const u64 *k = table + at_word;
#pragma unroll
		for (int j = 0; j < 16; j += 2) {
			a += bytes_hash(k + 2 * j, w + j);
			b += bytes_hash(k + 2 * j + 2, w + j + 1);
			asm volatile("" ::: "memory"); /* or clang reads ahead, and spills */
		}
		here += 128;
		word += 32;
		words -= 16;
	}
	if (words & 8) {
		w = known_at(v, here, 64);
		if (w) {
			const u64 *k = keys_at(keys, word, stream);
#pragma unroll
			for (int j = 0; j < 8; j += 2) {
				a += bytes_hash(k + 2 * j, w + j);
				b += bytes_hash(k + 2 * j + 2, w + j + 1);
			}
		}
		here += 64;
		word += 16;
	}
	if (words & 4) {
		w = known_at(v, here, 32);
		if (w) {
			const u64 *k = keys_at(keys, word, stream);
			a += bytes_hash(k, w + 0);
			b += bytes_hash(k + 2, w + 1);
			a += bytes_hash(k + 4, w + 2);
			b += bytes_hash(k + 6, w + 3);
		}
		here += 32;
		word += 8;
	}
	BOUND(words, 3);
	BOUND(here, MAX_FRAME);
	BOUND(word, DGRAM_WORDS - 1);
	sum = a + b;
	if (words & 2) {
		w = known_at(v, here, 16);
		if (w) {
			const u64 *k = keys_at(keys, word, stream);
			sum += bytes_hash(k, w) + bytes_hash(k + 2, w + 1);
		}
		here += 16;
		word += 4;
	}
	if (words & 1) {
		w = known_at(v, here, 8);
		if (w)
			sum += bytes_hash(keys_at(keys, word, stream), w);
		word += 2;
	}
	if (rest) { /* the last 8 bytes of the range, shifted so that the rest stands where its word would have it */
		w = known_at(v, off + len - 8, 8);
		u64 tail = w ? *w >> (8 * (8 - rest)) : 0;
		sum += word_hash(keys_at(keys, word, stream), tail);
		if (phase + len < 8)
			first = tail;
	}
	if (phase) /* bytes before the range were in its first word: take them out */
		sum -= word_hash(keys_at(keys, (pos & ~7u) >> 2, stream), first & ((1ull << (8 * phase)) - 1));
	return sum;
}

/* A FIN occupies a position without a byte. */
static __always_inline u64 fin_hash(const struct hash_keys *keys, u32 pos)
{
	return keys->fin * (*keys_at(keys, pos >> 2, true) + pos);
}

/* A word that belongs to no position: lengths, types, options. Bijective mixing (splitmix64's finalizer), then the key. */
static __always_inline u64 word_mix(const struct hash_keys *keys, u64 w)
{
	w ^= keys->len;
	w = (w ^ (w >> 30)) * 0xbf58476d1ce4e5b9ull;
	w = (w ^ (w >> 27)) * 0x94d049bb133111ebull;
	return w ^ (w >> 31);
}
