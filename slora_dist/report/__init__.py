"""Reports of runs: one page that shows what they learned, what it cost, and where every number comes from."""
