"""A package, since torch-fidelity 0.4 installs a `tests` of its own, which a plain folder would lose against."""
