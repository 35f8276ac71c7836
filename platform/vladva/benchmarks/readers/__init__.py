"""Readers: the forms in which annotations and images come -> plain rows. Nothing here knows what is measured."""
