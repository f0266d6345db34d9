"""Helpers of the tests: the pool of ranks, and what counts as equal."""

import os

# Before torch is imported, here and on ranks: a result of an op of ours that lies in an
# operand or in another result is an error, as it is for a user whose CI sets ``CI``.
os.environ["TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING"] = "1"
