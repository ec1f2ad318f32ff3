"""Accelerators of a package that is not bitwright's."""
