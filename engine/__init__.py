"""Backends that execute graphs. Importing this package imports none of them."""
