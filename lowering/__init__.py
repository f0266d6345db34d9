"""The rewritten attention to kernels and P2P transfers, forward and backward."""

if __name__ != "ringcompile.lowering":
    _message = f"import 'ringcompile.lowering', not {__name__!r}"
    raise ImportError(_message)
