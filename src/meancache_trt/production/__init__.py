"""Thousands of pictures from one bundle: runs over job files, and a renderer for services."""
