"""The HTTP surface: Ray Serve deployments that speak the OpenAI API. Models and search come from `vladva`."""
