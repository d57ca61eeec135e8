"""The agent: makes the host what the state file says, watches it, and heals it. Root, asyncio, never monkey-patched."""
