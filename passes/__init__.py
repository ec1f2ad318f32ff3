"""Relax passes (Relax in, Relax out): one file a pass."""
