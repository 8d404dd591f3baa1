"""The model: what an architecture looks like, what can be cut, edits, loading, writing."""
