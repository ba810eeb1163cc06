"""Training runs, attack runs, searches and Table I, from settings to stored results."""
