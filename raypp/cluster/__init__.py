"""Ray: the same work spread over workers and machines."""
