"""Data that the project makes itself, from the handwriting that comes with scikit-learn."""
