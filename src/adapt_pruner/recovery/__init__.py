"""Adapt-Accel: pruning and recovery training in turns."""
