"""A real federation on Flower: images stay at sites, each of which holds clients.

The server (:mod:`fedss.flower.server_app`) runs the driver of :mod:`fedss.training.experiment` with
the engine of :mod:`fedss.flower.engine`; a site (:mod:`fedss.flower.client_app`) answers its
messages. A site keeps nothing between messages: what it must know comes with each, so any of its
processes may die and come back. :mod:`fedss.flower.registry` is what the server remembers.
"""
