"""What rank 0 does with updates: how they become one, and how that one moves the global state."""
