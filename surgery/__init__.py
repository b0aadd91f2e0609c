"""Load a model, describe it, and cut it: the only room that knows Hugging Face modules by name."""
