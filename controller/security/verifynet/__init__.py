"""Every statement of the guide for one machine, as a line: `ask` looks, `judge` says. Imports problems, statefile, units, pki.

`asked` is what the profile wants, `seen` what there is, `probe` tries ports for real, `gather` fills in `seen`, `checks` judges.
"""

from controller.security.verifynet.asked import Asked, Peer, read_asked
from controller.security.verifynet.checks import Line, exit_code, judge
from controller.security.verifynet.gather import gather
from controller.security.verifynet.seen import Seen

__all__ = ["Asked", "Line", "Peer", "Seen", "exit_code", "gather", "judge", "read_asked"]
