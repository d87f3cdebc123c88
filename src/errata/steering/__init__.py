"""Edits that act in a scope on the way through a model: as values (`parts`), and at run time (`table`, and what it is made of)."""
