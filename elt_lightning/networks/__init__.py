"""The looped networks. Imports torch alone, so that they run wherever torch does."""
