"""The MOHAQ search over per-layer precisions."""
