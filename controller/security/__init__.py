"""The security guide: certificates, the router and its clients, firewalls per role, verification, incidents."""
