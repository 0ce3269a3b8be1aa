"""`distegnn launch`: one training on several hosts. See docs/distributed.md."""
