"""``python -m slora_dist`` is the same program as the console script ``slora-dist``."""

from slora_dist.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
