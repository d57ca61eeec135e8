"""The roads that are not OpenFlow: what of a host could let two networks meet beside the flows, and how to mend it.

`facts` asks the host's own tools, `checks` judges what they said, `nft` reads rulesets.
"""
