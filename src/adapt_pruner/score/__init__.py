"""Score units: passes over calibration windows, and what is made of their statistics."""
