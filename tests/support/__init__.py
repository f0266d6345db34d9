"""Helpers of the tests: the pool of ranks, and what counts as equal."""
