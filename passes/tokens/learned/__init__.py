"""Methods with weights of their own, one module per idea; their rows are in `passes/tokens/trained.py`."""
