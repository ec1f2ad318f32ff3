"""Accelerators: descriptions, cost models, links, code generation."""
