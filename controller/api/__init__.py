"""The HTTP API: what callers ask for becomes records in the store; agent and controller make them real. Changes nothing itself."""
