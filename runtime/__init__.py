"""Run a bundle without torch."""
