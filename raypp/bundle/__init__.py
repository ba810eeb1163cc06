"""Bundles: export, load, verify, describe."""
