"""How alike images are, and what a re-identification rate means."""
