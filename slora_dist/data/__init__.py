"""Documents: fetched, loaded, split over clients, and turned into batches of tokens."""
