"""A federated run on one rank. The only room that uses both transports and methods."""
