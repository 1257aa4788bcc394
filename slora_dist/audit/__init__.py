"""Whether a run's files agree with one another, with the plan made from its settings, and with what the kernel counted."""
