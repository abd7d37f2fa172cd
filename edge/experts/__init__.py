"""Experts that do not fit into memory: paged from a bundle, computed from their packed records."""
