"""Kernels of one tile: dense ones from torch, and the blocked loop for masks."""
