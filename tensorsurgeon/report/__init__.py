"""Rows as people read them: tables, and the same as JSON."""
