"""Readers: the forms in which annotations and pictures come -> plain rows. Nothing here knows what is measured."""
