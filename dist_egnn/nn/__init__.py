"""Layers: what an edge sends, what a node and the virtual nodes do with it."""
