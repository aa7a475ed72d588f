"""The evidence: experiments as TOML files, run by the three commands, collected into tables.

It starts `builder`, `trainer` and `evaluator` as a person would, and reads what they leave; it
imports neither of the other two.
"""
