"""HTTP services on Ray Serve: a bundle's classifier and the attacks on the bundle.

Only ``deployments`` and ``server`` import Ray.
"""
