"""File formats of other software: pure functions from codes and scales to tensors, and back.

A module per format. `write(coded)` gives the tensors of one linear by the ends of their names,
`read` is its inverse, `refusal(coded)` says why the format cannot hold a matrix, and `config` is
the section of config.json that readers need.
"""
