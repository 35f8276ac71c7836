"""vladva: turns a generative vision-language model into a retriever on a Ray cluster, and keeps the generator."""
