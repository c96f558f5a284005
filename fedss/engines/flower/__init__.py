"""A real federation on Flower: pictures stay at sites, each of which holds clients.

The server (:mod:`fedss.engines.flower.server`) runs the driver of :mod:`fedss.experiment` with the
engine of :mod:`fedss.engines.flower.engine`; a site (:mod:`fedss.engines.flower.site`) answers its
messages. A site keeps nothing between messages: what it must know comes with each, so any of its
processes may die and come back. :mod:`fedss.engines.flower.registry` is what the server remembers.
"""
