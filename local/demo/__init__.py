"""The main job on real input: July 2013's flights from New York, on the test clock, checked against the CSV.

Read in this order: `story` (what happens), `replay` (how it is told to Carillon), `oracle` (what must come of it,
computed without Carillon), `check` (whether it did).
"""
