"""The HTML report of an attack run."""
