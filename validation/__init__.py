"""Exactness against the cut eager model, quality against the original."""
