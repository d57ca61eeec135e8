"""The prover: what packets can do with a set of flows, shown before the flows are sent and on what switches hold."""
