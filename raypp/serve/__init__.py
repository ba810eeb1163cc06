"""The untrusted cloud: a bundle's classifier, and the attacks on it, over HTTP on Ray Serve.

``wire`` decides what a request may be, ``model`` what is served and how it is replaced, ``auth`` who may ask, ``http``
what is answered, ``haproxy`` what takes the requests where that is wanted; only ``app`` and ``run`` know Ray.
"""
