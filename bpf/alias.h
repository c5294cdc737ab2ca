/* Connections that the client knows by other numbers than their guest. A guest that was an SVM has opened some with numbers of its own, and S1 and S2
 * translated for it (bpf/translate.h). When it is promoted those are the guest's numbers for good, and when it is protected again, they are what both VMs
 * have, what is compared and held, and what a checkpoint copies. So the client's numbers are translated where its frames come in and go out, by P1 and P2
 * (bpf/alias.c), and the next secondary, which hears nothing but the guest's, has these entries too, for when it is promoted: by S2 and S3.
 *
 * An entry is made by user space (keep_numbers() of bpf/upkeep.c, or the other host's), once, and ends with its connection. */

/* The client has said SYN again, and what comes behind it belongs to that connection: so the PVM has taken it, whether its answer was seen here or not. */
static __always_inline bool begins_again(const struct alias *a, const struct packet *p)
{
	return a->again && (p->tcp_flags & (TCP_ACK | TCP_SYN | TCP_RST)) == TCP_ACK && p->seq == a->again_isn + 1;
}

/* S1, a segment from the client. Ports that are used again end the entry here too, and the guest's SYN may never be seen: there is no SVM before the first
 * copy, and a later copy may have been made behind the PVM's SYN-ACK. */
static __always_inline void alias_watch(const struct packet *p, const struct place *at, u64 now)
{
	if (!at->aliased)
		return;
	struct alias *a = aliases.lookup((struct flow_key *)&p->key);
	if (!a)
		return;
	if (p->tcp_flags & TCP_SYN) {
		if (p->seq != a->client_isn) { /* else a late copy of the one that opened it */
			a->again_isn = p->seq;
			a->again = 1;
		}
		return;
	}
	if (begins_again(a, p)) {
		aliases.delete((struct flow_key *)&p->key);
		return;
	}
	a->last_ns = now;
	if (p->tcp_flags & TCP_FIN)
		a->client_fin = 1;
}

/* A segment from the client. False: the connection has no other numbers. */
static __always_inline bool alias_input(const struct packet *p, const struct place *at, u64 now, struct deltas *d)
{
	if (!at->aliased || (p->tcp_flags & TCP_SYN)) /* a late one, or another connection's, whose answer ends the entry */
		return false;
	struct alias *a = aliases.lookup((struct flow_key *)&p->key);
	if (!a)
		return false;
	if (begins_again(a, p)) { /* S1 has heard the SYN, just before a promotion */
		aliases.delete((struct flow_key *)&p->key);
		return false;
	}
	a->last_ns = now;
	if (p->tcp_flags & TCP_FIN)
		a->client_fin = 1;
	if (!a->doubt) { /* (a reset is the guest's to believe: one out of its window, or forged, it ignores) */
		d->seq = a->seq_delta;
		d->ts = a->ts_delta;
	}
	return true;
}

/* A segment from the guest, or from its replica: that one changes no numbers, the primary does, and ends nothing, since it may have diverged. */
static __always_inline bool alias_output(const struct packet *p, const struct place *at, u64 now, struct deltas *d)
{
	if (!at->aliased)
		return false;
	struct alias *a = aliases.lookup((struct flow_key *)&p->key);
	if (!a)
		return false;
	if ((p->tcp_flags & TCP_SYN) && p->seq != a->guest_isn) { /* the ports are used again */
		aliases.delete((struct flow_key *)&p->key);
		return false;
	}
	if (a->again && !(p->tcp_flags & (TCP_SYN | TCP_RST)) && p->ack != a->again_isn + 1)
		a->again = 0; /* it goes on: that SYN was late, or forged */
	if (a->doubt && !(p->tcp_flags & (TCP_SYN | TCP_RST))) {
		if (!own_numbers(a->guest_high, a->seq_delta, p->seq, false))
			a->seq_delta = a->ts_delta = 0;
		a->doubt = 0;
	}
	if (at->nic->role == ROLE_SECONDARY && at->state != PROMOTED)
		return false;
	a->last_ns = now;
	if (p->tcp_flags & TCP_FIN)
		a->guest_fin = 1;
	a->reset = !!(p->tcp_flags & TCP_RST);
	d->seq = a->seq_delta;
	d->ts = a->ts_delta;
	return true;
}
