"""The paper's experiments, tables and figures, run through the same commands that users run."""
