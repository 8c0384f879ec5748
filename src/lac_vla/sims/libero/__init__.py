"""LIBERO on a machine without a screen, with a scripted expert that demonstrates its pick-and-place tasks.

:mod:`suites` is the protocol as data; :mod:`benchmark` is what an evaluation plays; :mod:`env` is one task, with the
pictures of :mod:`renderer` and the packages of :mod:`modules`. :mod:`expert` solves tasks by the geometry that
:mod:`scene` reads; :mod:`collect` stages its demonstrations and :mod:`packing` makes a dataset of them.
"""
