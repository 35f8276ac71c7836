"""What the tests share: small checkpoints and corpora, a real S3 server, workers to start as processes."""
