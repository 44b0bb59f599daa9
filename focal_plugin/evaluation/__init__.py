"""What a run came to: its results, its pictures and the look of all figures."""
