"""Faults on purpose: real ranks are killed, stopped, cut off and fed with nonsense, and what is left is held against the plan."""
