"""Equivariant graph networks with virtual nodes on geometric graphs too large for one device.

Importing this package imports nothing heavy: torch and DGL come with the module that needs them.
"""

import os

__version__ = "0.1.0"

# DGL asks for its backend on standard output unless it is told; this must stand before its first import.
os.environ.setdefault("DGLBACKEND", "pytorch")
