"""Decide what each axis gives up, in exact parameter arithmetic."""
