"""A study: one configuration, varied along axes, once per seed; its runs, its tables, its figures."""
