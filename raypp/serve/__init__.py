"""HTTP services: a bundle's classifier and the attacks on the bundle. ``deployments`` and ``server`` import Ray."""
