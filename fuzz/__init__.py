"""Coverage-guided fuzzing of what is read from others: ``make fuzz``."""
