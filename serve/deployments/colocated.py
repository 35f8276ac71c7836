"""Colocated: both modes from one copy of the weights, in one replica and one engine."""

from serve.deployments.embedding import Discriminative
from serve.deployments.generation import Generative


class Colocated(Discriminative, Generative):
    """Embeds with the adapter on, answers with it off, at the same time."""

    async def probe(self) -> None:
        """Do both."""
        await Discriminative.probe(self)
        await Generative.probe(self)
