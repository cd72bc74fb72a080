"""Measures `pf-files` beside the copying programs that a user would pick."""
