"""What is learned: corruption, losses against the data and against the teacher, ILSD. Imports torch alone."""
