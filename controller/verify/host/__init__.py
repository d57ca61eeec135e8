"""The roads that are not OpenFlow: what of a host could let two networks meet beside the flows, and how to mend it.

`tools` asks the host's own tools, `gather` and `firewall` read what they say into `facts`, `checks` judges it by what
`switch`, `kernel` and `tunnels` look at, `nft` follows a packet through a ruleset.
"""
