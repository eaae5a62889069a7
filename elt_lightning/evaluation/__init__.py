"""The sweep over loop counts: samples, scores, tables and pictures."""
