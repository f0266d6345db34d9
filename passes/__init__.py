"""Graph to graph: what reads, shards and rewrites the ATen graph of a model."""

if __name__ != "ringcompile.passes":
    _message = f"import 'ringcompile.passes', not {__name__!r}"
    raise ImportError(_message)
