"""Clients: protect files, call the services, show a demo page."""
