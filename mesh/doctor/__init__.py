"""What could be wrong on this machine and in its mesh: small checks, each a look and a pure judgement of what was seen.

A check never raises and never changes anything; it names what is wrong and what to type. :mod:`mesh.doctor.examination`
runs them all at once.
"""
