"""The Triton backend: a module per op, and what they share (`launch`, `device`, `interpreter`)."""
