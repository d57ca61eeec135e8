"""Incidents: cutting servers and networks off, evidence, and the way back. Imports problems and pki's disk."""

from controller.security.incident.evidence import Collection, Source
from controller.security.incident.recover import Recovery, Step
from controller.security.incident.seals import Peer, Seal, Seals, Target

__all__ = ["Collection", "Peer", "Recovery", "Seal", "Seals", "Source", "Step", "Target"]
