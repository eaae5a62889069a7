"""Speed and memory, measured side by side in one run: what `elt bench` prints and writes."""
