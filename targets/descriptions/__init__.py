"""Accelerators described as data, one YAML file each."""
