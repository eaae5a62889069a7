"""Elastic Looped Transformers: one small shared stack of layers, run L times, usable at every L.

Importing this package imports neither torch nor Lightning, so that ``elt --help`` answers at once.
"""

__version__ = "0.1.0"
