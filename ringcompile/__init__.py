"""Exact, dilated and block-sparse ring attention as a torch.compile backend."""
