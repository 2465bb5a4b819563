"""Will it fit, how fast: plain arithmetic, no torch."""
