"""What is learned: corruption, the loss against the data, the loss against the teacher, and ILSD. Imports torch alone."""
