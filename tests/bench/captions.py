"""What each table of the report shows, and how it was measured."""

AIMS = "Each figure is the worst of all rows that the aim covers."

TEST_RUNS = """\
ns per packet by BPF_PROG_TEST_RUN, each frame a run of its own (`repeat` 1), so that every run has another sequence
number and another flow; the duration of an empty program measured in the same way is taken off."""

CPU_AND_RATE = """\
CPU per compared packet: of colo-compare the time that QEMU's threads were on a CPU (/proc/PID/task/*/schedstat; what
its sockets cost the other side is not in it), of coloebpf the run time of P2 and P4 (bpf_prog_info: all runs, also
those for packets that come back released; less the {floor:.0f} ns that the kernel's accounting itself takes a run).
Packets/s: best run; the feeder, both guests and the client share the two cores with what is measured. The bridge
carries the primary's frames alone, as it would without coloebpf."""

HOOKS = """\
ns per released packet, and in parentheses runs per released packet, while this traffic goes through the lab."""

WHOLE_MACHINE = """\
CPU time of the whole machine per released packet in us (/proc/stat: all but idle, the feeder's included). In the
bridge's run both guests send too, and the secondary's frames end at its host's vif; the difference is all that
coloebpf adds on both hosts: S2, the forward link, P3, P4, P2 and the second pass of released packets."""

LATENCY = """\
us from the later of a frame's two writes to its reading at the client, open loop. Through the lab that is the whole
way over veth pairs and two bridges; `added` is the difference of the medians to the plain bridge."""
