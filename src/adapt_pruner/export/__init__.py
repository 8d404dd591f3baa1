"""What other engines need to run a model."""
