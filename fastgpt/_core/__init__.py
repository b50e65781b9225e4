"""The road that every op takes: its declaration, its registration and the choice of a backend."""
